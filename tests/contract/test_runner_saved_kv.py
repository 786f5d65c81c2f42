"""A runner that leaves and one that comes back: prompts that were read once need not be read again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import Answer, RunnerProcess
from tests.support.tiny_models import CHATML, make_tiny_gemma, make_tiny_llama, make_tiny_mamba

STORY = " ".join(["the house of the people was small and the water was great but they all went home"] * 4)
MORE = " and the"

KINDS: dict[str, Callable[[Path], Path]] = {
    "llama": make_tiny_llama,
    "gemma": make_tiny_gemma,
    "mamba": make_tiny_mamba,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for kind, make in KINDS.items():
        make(directory / f"{kind}.gguf")
    make_tiny_llama(directory / "chat.gguf", chat_template=CHATML)
    return directory


@contextmanager
def running(model: Path, kv_dir: Path | None, *, num_ctx: int = 256) -> Iterator[RunnerProcess]:
    with RunnerProcess() as runner:
        runner.load(model, kv_dir=kv_dir, num_ctx=num_ctx)
        yield runner


def leave(runner: RunnerProcess, *, save_s: float = 20) -> None:
    runner.drain(save_s=save_s)
    assert runner.wait() == 0, runner.log()


def ask(runner: RunnerProcess, prompt: str = STORY, scope: str = "a", num_predict: int = 40) -> Answer:
    return runner.ask(prompt, scope=scope, num_predict=num_predict)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_next_runner_goes_on_where_this_one_left(models: Path, tmp_path: Path, kind: str) -> None:
    model = models / f"{kind}.gguf"
    with running(model, tmp_path) as runner:
        first = ask(runner)
        leave(runner)
    prompt = STORY + first.text + MORE
    with running(model, None) as runner:
        expected = ask(runner, prompt)
    with running(model, tmp_path) as runner:
        answer = ask(runner, prompt)
        leave(runner)
    assert answer.text == expected.text
    assert answer.done.cached_tokens > first.done.prompt_tokens
    assert expected.done.cached_tokens == 0
    with running(model, tmp_path) as runner:
        assert ask(runner, prompt + answer.text + MORE).done.cached_tokens > answer.done.prompt_tokens


def test_nobody_gets_what_others_saved(models: Path, tmp_path: Path) -> None:
    with running(models / "llama.gguf", tmp_path) as runner:
        ask(runner, scope="a")
        leave(runner)
    with running(models / "llama.gguf", tmp_path) as runner:
        assert ask(runner, scope="b").done.cached_tokens == 0
        assert ask(runner, scope="a").done.cached_tokens > 0


def test_what_the_manifest_says_is_saved_for_everybody(models: Path, tmp_path: Path) -> None:
    system = frames_pb2.Chat(messages=[frames_pb2.ChatMessage(role="system", content=STORY)])

    def cached(runner: RunnerProcess, scope: str) -> int:
        chat = [("system", STORY), ("user", f"call {scope}")]
        return runner.ask(chat=chat, scope=scope, num_predict=4).done.cached_tokens

    def loaded(runner: RunnerProcess) -> RunnerProcess:
        runner.load(models / "chat.gguf", kv_dir=tmp_path, manifest_chat=system)
        return runner

    with RunnerProcess() as runner:
        assert cached(loaded(runner), "a") == 0
        in_memory = cached(runner, "b")
        leave(runner)
    assert in_memory > 32
    with RunnerProcess() as runner:
        assert cached(loaded(runner), "c") == in_memory


def test_another_context_is_another_cache(models: Path, tmp_path: Path) -> None:
    with running(models / "llama.gguf", tmp_path) as runner:
        ask(runner)
        leave(runner)
    with running(models / "llama.gguf", tmp_path, num_ctx=128) as runner:
        assert ask(runner).done.cached_tokens == 0


def test_damaged_files_are_removed_and_the_prompt_is_read_again(models: Path, tmp_path: Path) -> None:
    with running(models / "llama.gguf", tmp_path) as runner:
        expected = ask(runner)
        leave(runner)
    (file,) = tmp_path.iterdir()
    with file.open("r+b") as opened:
        opened.seek(-1000, os.SEEK_END)
        opened.write(b"\x55" * 16)
    with running(models / "llama.gguf", tmp_path) as runner:
        answer = ask(runner)
        assert answer.text == expected.text
        assert answer.done.cached_tokens == 0
        assert list(tmp_path.iterdir()) == []
        leave(runner)
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_saved_without_time_or_directory(models: Path, tmp_path: Path) -> None:
    with running(models / "llama.gguf", tmp_path) as runner:
        ask(runner)
        leave(runner, save_s=0)
    with running(models / "llama.gguf", None) as runner:
        ask(runner)
        leave(runner)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_runner_loses_only_what_was_not_saved(models: Path, tmp_path: Path) -> None:
    with running(models / "llama.gguf", tmp_path) as runner:
        ask(runner)
        leave(runner)
    with running(models / "llama.gguf", tmp_path) as runner:
        ask(runner, "the water " * 50)
        os.kill(runner.process.pid, signal.SIGKILL)
        runner.wait()
    with running(models / "llama.gguf", tmp_path) as runner:
        assert ask(runner).done.cached_tokens > 0
        assert ask(runner, "the water " * 50).done.cached_tokens < 10


def test_a_directory_that_cannot_be_used_is_told_and_harms_nobody(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with running(models / "llama.gguf", tmp_path / "file" / "kv") as runner:
        assert ask(runner).text
        leave(runner)
        assert runner.log().count("saved prefixes") == 1
