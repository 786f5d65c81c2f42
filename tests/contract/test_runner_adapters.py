"""Adapters in a runner: answers are those of the merged weights, whoever else is served and whatever is remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import Answer, RunnerProcess
from tests.support.tiny_adapters import ATTENTION, make_tiny_adapter, merge
from tests.support.tiny_models import CHATML, make_tiny_gemma, make_tiny_llama, make_tiny_mamba

PROMPT = "the house of the people was small and the water was great"
STORY = " ".join([PROMPT] * 4)
EVERYTHING = (*ATTENTION, "blk.0.ffn_down.weight", "blk.1.ffn_gate.weight", "output.weight", "token_embd.weight")


@dataclass
class Files:
    """A model, two adapters for it, and what models they make."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def one(self) -> Path:
        return self.folder / "one.gguf"

    @property
    def two(self) -> Path:
        return self.folder / "two.gguf"

    def merged(self, one: float, two: float = 0.0) -> Path:
        path = self.folder / f"merged-{one:g}-{two:g}.gguf"
        return path if path.exists() else merge(path, self.base, [(self.one, one), (self.two, two)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = Files(tmp_path_factory.mktemp("adapters"))
    make_tiny_llama(files.base, chat_template=CHATML)
    make_tiny_adapter(files.one, files.base, seed=1, tensors=EVERYTHING)
    make_tiny_adapter(files.two, files.base, seed=2, rank=2, alpha=3.0)
    return files


@contextmanager
def running(model: Path, *adapters: tuple[Path, float], **options: Any) -> Iterator[RunnerProcess]:
    with RunnerProcess() as runner:
        runner.load(model, adapters=adapters, **options)
        yield runner


def scales(*pairs: tuple[int, float]) -> dict[str, Any]:
    return {"adapters": [frames_pb2.AdapterScale(adapter=adapter, scale=scale) for adapter, scale in pairs]}


def text_of(model: Path, prompt: str = PROMPT) -> str:
    with running(model) as runner:
        return runner.ask(prompt, num_predict=40).text


@pytest.mark.parametrize(("one", "two"), [(1.0, 0.0), (0.5, 1.0), (-1.0, 0.25)])
def test_an_adapted_model_says_what_the_merged_weights_say(files: Files, one: float, two: float) -> None:
    expected = text_of(files.merged(one, two))
    assert expected != text_of(files.base)
    with running(files.base, (files.one, one), (files.two, two)) as runner:
        assert runner.ask(PROMPT, num_predict=40).text == expected


def test_each_request_has_the_scales_it_asks_for(files: Files) -> None:
    wanted = {(1.0, 0.0): (), (0.0, 0.0): ((0, 0.0),), (0.5, 1.0): ((0, 0.5), (1, 1.0)), (1.0, 1.0): ((1, 1.0),)}
    expected = {pair: text_of(files.merged(*pair)) for pair in wanted}
    assert len(set(expected.values())) == len(wanted)
    with running(files.base, (files.one, 1.0), (files.two, 0.0)) as runner:
        # At once, so that steps of the one and the other take turns; then again, with what is in memory by then.
        for _ in range(2):
            with runner.paused():
                asked = {
                    pair: runner.submit(PROMPT, num_predict=40, options=scales(*changes))
                    for pair, changes in wanted.items()
                }
            answers = {pair: runner.answer(request) for pair, request in asked.items()}
            assert {pair: answer.text for pair, answer in answers.items()} == expected


def test_drafts_and_steps_of_ones_own_have_the_adapters_as_well(files: Files) -> None:
    expected = text_of(files.merged(0.5), STORY)
    with RunnerProcess() as runner:
        runner.ask_load(
            files.base,
            num_ctx=256,
            slots=4,
            num_batch=64,
            num_thread=1,
            # It knows nothing of adapters, so that most of its guesses are wrong.
            draft_paths=[str(files.base)],
            adapters=[(files.one, 1.0)],
        )
        runner.until(lambda: runner.ready is not None)
        ways: list[dict[str, Any]] = [{"prompt_lookup": True}, {"draft_num_predict": 8}, {"deterministic": True}, {}]
        asked = [runner.submit(STORY, num_predict=40, options=scales((0, 0.5)), **way) for way in ways]
        others = [runner.submit(STORY, num_predict=40, **way) for way in ways[2:]]
        assert [runner.answer(request).text for request in asked] == [expected] * 4
        assert [runner.answer(request).text for request in others] == [text_of(files.merged(1.0), STORY)] * 2


def test_prefixes_are_shared_among_equal_adapters_only(files: Files) -> None:
    with running(files.base, (files.one, 1.0)) as runner:
        cached = [
            runner.ask(PROMPT, num_predict=1, options=options).done.cached_tokens
            for options in (scales(), scales((0, 1.0)), scales((0, 0.5)), scales((0, 0.5)), scales())
        ]
    length = cached[1]
    assert cached == [0, length, 0, length, length]
    assert length > 0


def test_what_the_manifest_says_is_not_shared_with_other_adapters(files: Files) -> None:
    chat = frames_pb2.Chat(messages=[frames_pb2.ChatMessage(role="system", content=STORY)])
    turns = [("system", STORY), ("user", "who was there")]
    with running(files.merged(0.5)) as runner:
        expected = runner.ask(chat=turns, num_predict=40).text
    with running(files.base, (files.one, 1.0), manifest_chat=chat) as runner:
        first = runner.ask(chat=turns, scope="a", num_predict=40)
        others = runner.ask(chat=turns, scope="b", num_predict=40)
        adapted = [runner.ask(chat=turns, scope=who, num_predict=40, options=scales((0, 0.5))) for who in "cd"]
    assert (first.done.cached_tokens, others.done.cached_tokens > 40) == (0, True)
    assert [answer.done.cached_tokens for answer in adapted] == [0, 0]
    assert [answer.text for answer in adapted] == [expected] * 2


def test_saved_prefixes_belong_to_the_adapters_they_were_read_with(files: Files, tmp_path: Path) -> None:
    def ask(runner: RunnerProcess, *changes: tuple[int, float]) -> Answer:
        return runner.ask(STORY, num_predict=20, options=scales(*changes))

    def leave(runner: RunnerProcess) -> None:
        runner.drain(save_s=20)
        assert runner.wait() == 0, runner.log()

    with running(files.base, (files.one, 1.0), kv_dir=tmp_path) as runner:
        first = ask(runner), ask(runner, (0, 0.5))
        leave(runner)
    with running(files.base, (files.one, 1.0), kv_dir=tmp_path) as runner:
        assert ask(runner, (0, 0.0)).done.cached_tokens == 0
        again = ask(runner), ask(runner, (0, 0.5))
        leave(runner)
    assert [answer.text for answer in again] == [answer.text for answer in first]
    assert all(answer.done.cached_tokens > 40 for answer in again)
    with running(files.base, (files.one, 0.75), kv_dir=tmp_path) as runner:
        assert ask(runner).done.cached_tokens == 0


def test_parked_prefixes_come_back_to_their_adapters(files: Files) -> None:
    prompts = [f"{word} {STORY}" for word in ("time", "first")]
    asked = [(prompt, changes) for prompt in prompts for changes in (scales(), scales((0, 0.5)))]
    with running(files.base, (files.one, 1.0), slots=1, num_ctx=256) as runner:
        first = [runner.ask(prompt, num_predict=20, options=options) for prompt, options in asked]
        again = [runner.ask(prompt, num_predict=20, options=options) for prompt, options in asked]
        assert runner.ping().stats.parked_bytes > 0
    assert [answer.text for answer in again] == [answer.text for answer in first]
    assert all(answer.done.cached_tokens > 40 for answer in again)


@pytest.mark.parametrize("make", [make_tiny_gemma, make_tiny_mamba])
def test_other_memories_take_adapters_as_well(make: Callable[[Path], Path], tmp_path: Path) -> None:
    base = make(tmp_path / "base.gguf")
    tensors = ["blk.0.ssm_in.weight"] if make is make_tiny_mamba else ["blk.0.attn_q.weight", "blk.1.ffn_up.weight"]
    adapter = make_tiny_adapter(tmp_path / "adapter.gguf", base, tensors=tensors)
    merged = merge(tmp_path / "merged.gguf", base, [(adapter, 1.0)])
    expected, plain = text_of(merged, STORY), text_of(base, STORY)
    assert expected != plain
    with running(base, (adapter, 1.0)) as runner:
        assert runner.ask(STORY, num_predict=40).text == expected
        assert runner.ask(STORY, num_predict=40, options=scales((0, 0.0))).text == plain
        assert runner.ask(STORY, num_predict=40).text == expected


def test_embeddings_are_those_of_the_merged_weights(files: Files) -> None:
    def embed(runner: RunnerProcess) -> list[float]:
        frame = runner.call(embed=frames_pb2.Embed(inputs=[PROMPT]))
        return list(frame.embedded.vectors[0].values)

    with running(files.merged(1.0)) as runner:
        expected = embed(runner)
    with running(files.base) as runner:
        plain = embed(runner)
    with running(files.base, (files.one, 1.0)) as runner:
        assert embed(runner) == pytest.approx(expected, abs=1e-4)
    assert plain != pytest.approx(expected, abs=1e-2)


def test_an_adapter_that_does_not_exist_is_an_error_of_the_request(files: Files) -> None:
    with running(files.base, (files.one, 1.0)) as runner:
        failed = runner.ask(PROMPT, num_predict=4, options=scales((1, 1.0))).failure
        assert (failed.kind, failed.field) == (frames_pb2.Failed.KIND_INVALID, "adapters")
        assert "1" in failed.message
        assert runner.ask(PROMPT, num_predict=4).done.generated_tokens == 4


def test_a_file_that_is_no_adapter_fails_the_load(files: Files, tmp_path: Path) -> None:
    wide = make_tiny_adapter(tmp_path / "wide.gguf", files.base, widen=32)
    late = make_tiny_adapter(tmp_path / "late.gguf", files.base, invocation_tokens=[300, 301])
    for path, why in ((files.base, "adapter"), (wide, "incorrect shape"), (late, "aLoRA")):
        with RunnerProcess() as runner:
            runner.ask_load(files.base, num_ctx=256, slots=1, num_batch=64, num_thread=1, adapters=[(path, 1.0)])
            runner.until(lambda runner=runner: runner.load_failed is not None)  # type: ignore[misc]
            assert runner.load_failed is not None
            assert runner.load_failed.kind == frames_pb2.LoadFailed.KIND_INCOMPATIBLE
            assert why in runner.load_failed.message
            assert path.name in runner.load_failed.message


def test_memory_is_reported_with_its_adapters_and_once(files: Files) -> None:
    with running(files.base, num_thread=0) as runner:
        assert runner.ready is not None
        plain = runner.ready
    with running(files.base, (files.one, 1.0), num_thread=0) as runner:
        assert runner.ready is not None
        adapted = runner.ready
    assert plain.weights_bytes < adapted.weights_bytes < plain.weights_bytes + 2 * files.one.stat().st_size
    assert adapted.compute_bytes < 1.2 * plain.compute_bytes
