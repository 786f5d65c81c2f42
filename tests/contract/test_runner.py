"""A real runner process, spoken to over its socket as the daemon does."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import RunnerProcess
from tests.support.shared_models import STORIES
from tests.support.tiny_models import (
    CHATML,
    make_scripted_llama,
    make_tiny_gemma,
    make_tiny_llama,
    make_tiny_mamba,
    split_model,
)

Failed = frames_pb2.Failed
Finished = frames_pb2.Finished
LoadFailed = frames_pb2.LoadFailed

STORY = "the people went to the house and saw that the water was great"
LONG = " ".join(["the house of the people was small and the water was great but they all went home"] * 12)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    make_tiny_llama(directory / "tiny.gguf", chat_template=CHATML)
    make_tiny_llama(directory / "raw.gguf")
    make_tiny_llama(directory / "wide.gguf", n_embd=128, n_head=2, n_ctx=4096)
    make_tiny_llama(directory / "bytes.gguf", byte_output=True)
    make_tiny_gemma(directory / "gemma.gguf")
    make_tiny_mamba(directory / "mamba.gguf")
    make_scripted_llama(
        directory / "script.gguf", [" one", " two", " three", *"🙂é漢".encode(), " end", ".", "!"], chat_template=CHATML
    )
    make_scripted_llama(directory / "loop.gguf", [" one", " two", " three", " four"], loop=True, n_ctx=8192)
    return directory


@pytest.fixture
def runner() -> Iterator[RunnerProcess]:
    with RunnerProcess() as process:
        yield process


@pytest.fixture(scope="module")
def tiny(models: Path) -> Iterator[RunnerProcess]:
    """A runner with a random model, shared by tests that leave nothing behind."""
    with RunnerProcess() as process:
        process.load(models / "tiny.gguf")
        yield process


@pytest.fixture(scope="module")
def script(models: Path) -> Iterator[RunnerProcess]:
    """A runner with a model that answers ` one two three🙂é漢 end.!` and ends."""
    with RunnerProcess() as process:
        process.load(models / "script.gguf")
        yield process


# Loading


def test_says_hello_and_what_it_loaded(runner: RunnerProcess, models: Path) -> None:
    ready = runner.load(models / "tiny.gguf", num_ctx=128, slots=3)
    assert runner.hello is not None
    assert runner.hello.pid == runner.process.pid
    assert runner.hello.engine_version
    assert (ready.num_ctx, ready.train_ctx, ready.slots, ready.num_thread) == (128, 256, 3, 1)
    assert ready.has_template
    assert runner.progress == sorted(runner.progress)
    assert runner.progress[-1] == 1.0


def test_reports_the_bytes_it_allocated(runner: RunnerProcess, models: Path) -> None:
    path = models / "wide.gguf"
    ready = runner.load(path, num_ctx=1024, slots=4)
    layers, embd, f16_bytes = 2, 128, 2
    assert ready.kv_bytes == 2 * layers * embd * f16_bytes * 1024 * 4
    assert ready.weights_bytes == pytest.approx(path.stat().st_size, rel=0.05)
    assert 0 < ready.compute_bytes < 64 << 20
    assert ready.vram_bytes == 0
    assert psutil.Process(runner.process.pid).memory_info().rss > ready.weights_bytes + ready.compute_bytes


def test_a_context_beyond_the_models_own_is_not_made(runner: RunnerProcess, models: Path) -> None:
    assert runner.load(models / "raw.gguf", num_ctx=100_000).num_ctx == 256


def test_loads_shards(runner: RunnerProcess, models: Path, tmp_path: Path, tiny: RunnerProcess) -> None:
    whole = make_tiny_llama(tmp_path / "model.gguf", chat_template=CHATML)
    shards = split_model(whole, 3)
    # As in the store: names that say nothing about order.
    renamed = [shard.rename(tmp_path / f"blob-{9 - index}") for index, shard in enumerate(shards)]
    whole.unlink()
    runner.load(*renamed)
    assert runner.ask(STORY, num_predict=20).text == tiny.ask(STORY, num_predict=20).text


def test_loads_without_a_memory_mapping(runner: RunnerProcess, models: Path, tiny: RunnerProcess) -> None:
    assert runner.load(models / "tiny.gguf", use_mmap=False).weights_bytes > 0
    assert runner.ask(STORY, num_predict=20).text == tiny.ask(STORY, num_predict=20).text


def test_measures_threads(runner: RunnerProcess, tmp_path: Path) -> None:
    # Large enough to be worth measuring.
    path = make_tiny_llama(tmp_path / "m.gguf", n_layer=4, n_embd=512, n_head=8, n_ff=1024)
    cores = len(os.sched_getaffinity(0))
    assert 1 <= runner.load(path, num_thread=0).num_thread <= cores
    assert runner.ask(STORY, num_predict=5).done.prompt_tokens > 0


def load_failure(runner: RunnerProcess, *paths: Path, **options: Any) -> frames_pb2.LoadFailed:
    runner.ask_load(*paths, **{"num_ctx": 256, "slots": 4, "num_batch": 64, "num_thread": 1, **options})
    runner.until(lambda: runner.load_failed is not None)
    assert runner.load_failed is not None
    assert runner.wait() == 1
    return runner.load_failed


def test_a_device_that_the_engine_does_not_find_is_refused_by_its_name(runner: RunnerProcess, models: Path) -> None:
    lost = frames_pb2.DevicePart(device="cuda7", part=1.0, bus_id="0000:c1:00.0")
    failed = load_failure(runner, models / "tiny.gguf", num_gpu=-1, devices=[lost])
    assert failed.kind == frames_pb2.LoadFailed.KIND_DEVICE_GONE
    assert failed.message.startswith("the engine does not find the device cuda7 at 0000:c1:00.0; it finds ")


def test_a_truncated_file_is_refused_with_the_engines_words(
    runner: RunnerProcess, models: Path, tmp_path: Path
) -> None:
    data = (models / "tiny.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: len(data) // 2])
    failed = load_failure(runner, path)
    assert failed.kind == LoadFailed.KIND_INCOMPATIBLE
    assert "not within the file bounds" in failed.message
    assert failed.message in runner.log() or failed.message.split("; ")[0] in runner.log()


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a model" * 100])
def test_what_is_not_a_model_is_refused(runner: RunnerProcess, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    failed = load_failure(runner, path)
    assert failed.kind == LoadFailed.KIND_INCOMPATIBLE
    assert failed.message


def test_a_missing_file_is_refused(runner: RunnerProcess, tmp_path: Path) -> None:
    failed = load_failure(runner, tmp_path / "absent.gguf")
    assert failed.kind == LoadFailed.KIND_INCOMPATIBLE
    assert "absent.gguf" in failed.message


def test_too_little_memory_is_told_apart(runner: RunnerProcess, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "huge.gguf", n_ctx=1 << 20)
    runner.until(lambda: runner.hello is not None)
    process = psutil.Process(runner.process.pid)
    # A gigabyte of KV cache in half of that.
    room_bytes = process.memory_info().vms + (512 << 20)
    process.rlimit(psutil.RLIMIT_AS, (room_bytes, room_bytes))
    failed = load_failure(runner, path, num_ctx=1 << 20, slots=2)
    assert failed.kind == LoadFailed.KIND_OUT_OF_MEMORY
    assert "allocate" in failed.message


def test_a_load_is_given_up_when_the_daemon_goes(runner: RunnerProcess, models: Path) -> None:
    runner.ask_load(models / "tiny.gguf", num_ctx=256, slots=1, num_batch=64, num_thread=1)
    runner.socket.close()
    assert runner.wait() == 0


# Generating


def llama_text(path: Path, prompt: str, num_predict: int, *, flash: bool = False) -> tuple[str, int]:
    """Return what llama-cpp-python itself answers, greedy, with the count of tokens; in a process of its own."""
    program = """
        import json, sys
        import llama_cpp
        path, prompt, count, flash = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
        model = llama_cpp.Llama(path, n_ctx=0, flash_attn=flash, n_threads=1, verbose=False)
        answer = model.create_completion(prompt, max_tokens=count, temperature=0)
        print(json.dumps([answer["choices"][0]["text"], answer["usage"]["completion_tokens"]]))
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(path), prompt, str(num_predict), str(flash)],
        check=True,
        capture_output=True,
    ).stdout
    text, count = json.loads(output.splitlines()[-1])
    return text, count


@pytest.mark.parametrize("name", ["tiny", "wide", "gemma", "mamba"])
def test_greedy_says_what_llama_cpp_python_says(runner: RunnerProcess, models: Path, name: str) -> None:
    path = models / f"{name}.gguf"
    runner.load(path, num_ctx=256)
    answer = runner.ask(STORY, num_predict=60)
    assert (answer.text, answer.done.generated_tokens) == llama_text(path, STORY, 60)


def test_greedy_on_a_trained_model_says_what_llama_cpp_python_says(runner: RunnerProcess) -> None:
    runner.load(STORIES, num_ctx=4096)
    answer = runner.ask("Once upon a time", num_predict=200)
    assert (answer.text, answer.done.generated_tokens) == llama_text(STORIES, "Once upon a time", 200)


def test_one_answer_in_full(script: RunnerProcess) -> None:
    answer = script.ask("hello")
    assert answer.text == " one two three🙂é漢 end.!"
    done = answer.done
    assert done.reason == Finished.REASON_STOP
    assert done.stop == ""
    assert done.generated_tokens == 6 + len("🙂é漢".encode())
    assert answer.started is not None
    assert answer.started.prompt_tokens == done.prompt_tokens == 4
    assert done.queue_ns >= 0
    assert done.prompt_ns > 0
    assert done.generate_ns > 0
    assert answer.delta_tokens == sorted(answer.delta_tokens)
    assert answer.terminals == 1


def test_a_large_context_takes_flash_attention(runner: RunnerProcess, models: Path) -> None:
    """Plain attention would need two gigabytes for the scores of two heads, 4096 tokens in a step, 65536 of context."""
    path = models / "wide.gguf"
    ready = runner.load(path, num_ctx=4096, slots=16, num_batch=4096)
    assert ready.compute_bytes < 1 << 30
    answer = runner.ask(STORY, num_predict=60)
    assert (answer.text, answer.done.generated_tokens) == llama_text(path, STORY, 60, flash=True)


@pytest.mark.parametrize("name", ["tiny", "wide", "gemma", "mamba"])
def test_many_at_once_say_what_each_says_alone(runner: RunnerProcess, models: Path, name: str) -> None:
    path = models / f"{name}.gguf"
    prompts = [f"{start} {STORY}"[: 20 + 9 * index] for index, start in enumerate(["we", "they", "water", "all"] * 3)]
    runner.load(path, slots=4, num_batch=16)
    together = [runner.submit(prompt, scope=f"{index}", num_predict=40) for index, prompt in enumerate(prompts)]
    texts = [runner.answer(request_id).text for request_id in together]
    with RunnerProcess() as alone:
        alone.load(path, slots=1, num_batch=256)
        assert texts == [
            alone.ask(prompt, scope=f"{index}", num_predict=40).text for index, prompt in enumerate(prompts)
        ]


def test_answers_are_interleaved(runner: RunnerProcess, models: Path) -> None:
    """A short answer that is asked for later ends before a long one."""
    runner.load(models / "loop.gguf", num_ctx=4096)
    long = runner.submit("hello", num_predict=4000)
    runner.until(lambda: bool(runner.answers[long].texts))
    short = runner.submit("hello there", num_predict=3)
    assert runner.answer(long).done.generated_tokens == 4000
    assert runner.ended == [short, long]


def test_more_requests_than_slots_take_turns(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", slots=2)
    ids = [runner.submit(f"hello {index}", num_predict=50) for index in range(20)]
    assert {runner.answer(request_id).text.count("three") for request_id in ids} == {12}
    order = [runner.answers[request_id].done.queue_ns for request_id in ids]
    assert order[-1] > order[0]


# Ends


def test_num_predict_ends_with_length(script: RunnerProcess) -> None:
    answer = script.ask("hello", num_predict=2)
    assert answer.text == " one two"
    assert answer.done.reason == Finished.REASON_LENGTH
    assert answer.done.generated_tokens == 2


def test_num_predict_zero_only_reads_the_prompt(script: RunnerProcess) -> None:
    answer = script.ask("hello you", num_predict=0, scope="zero")
    assert (answer.text, answer.done.generated_tokens) == ("", 0)
    assert answer.done.reason == Finished.REASON_LENGTH
    again = script.ask("hello you there", num_predict=1, scope="zero")
    assert again.done.cached_tokens == answer.done.prompt_tokens


def test_a_full_context_ends_with_length(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", num_ctx=64)
    answer = runner.ask("hello", num_predict=-1)
    assert answer.done.reason == Finished.REASON_LENGTH
    assert answer.done.prompt_tokens + answer.done.generated_tokens == 64


def test_a_prompt_as_long_as_the_context_fails_with_both_numbers(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", num_ctx=64)
    words = " ".join(["the"] * 62)
    fits = runner.ask(words, num_predict=-1)
    assert (fits.done.prompt_tokens, fits.done.generated_tokens) == (63, 1)
    failed = runner.ask(words + " the").failure
    assert failed.kind == Failed.KIND_CONTEXT_LENGTH
    assert (failed.prompt_tokens, failed.context_tokens) == (64, 64)
    assert "64 tokens" in failed.message
    # So long that it is tokenized aside; the count is exact all the same.
    failed = runner.ask(" ".join(["the"] * 50_000)).failure
    assert (failed.prompt_tokens, failed.context_tokens) == (50_001, 64)


def test_a_long_prompt_is_tokenized_aside_and_served(runner: RunnerProcess, models: Path) -> None:
    prompt = " ".join(["between"] * 4000) + "!" + " " * 2000
    assert len(prompt.encode()) > 32 << 10
    runner.load(models / "loop.gguf", num_ctx=8192, num_batch=512)
    answer = runner.ask(prompt, num_predict=2)
    assert answer.done.prompt_tokens > 4000
    assert answer.text == " one two"


@pytest.mark.parametrize(
    ("stop", "text", "matched"),
    [
        ([" three"], " one two", " three"),
        (["two th"], " one ", "two th"),
        (["é漢"], " one two three🙂", "é漢"),
        (["e two", "one"], " ", "one"),
        (["no such thing"], " one two three🙂é漢 end.!", ""),
        # The end comes before this could become a stop text, so it is shown.
        (["!?"], " one two three🙂é漢 end.!", ""),
    ],
)
def test_stop_texts(script: RunnerProcess, stop: list[str], text: str, matched: str) -> None:
    answer = script.ask("hello", stop=stop)
    assert answer.text == text
    assert answer.done.stop == matched
    assert answer.done.reason == Finished.REASON_STOP


def test_characters_are_never_cut(script: RunnerProcess) -> None:
    for count in range(4, 12):
        answer = script.ask("hello", num_predict=count)
        whole = " one two three🙂é漢".encode()
        shown = {4: 0, 5: 0, 6: 0, 7: 4, 8: 4, 9: 6, 10: 6, 11: 6}[count]
        assert answer.text == whole[: len(" one two three") + shown].decode()


def test_invalid_bytes_become_replacement_characters(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "bytes.gguf")
    answer = runner.ask(STORY, num_predict=60)
    text, count = llama_text(models / "bytes.gguf", STORY, 60)
    # llama-cpp-python goes on when the last token ends within a character, and shows nothing for invalid bytes.
    assert answer.done.generated_tokens == 60 <= count
    assert "\N{REPLACEMENT CHARACTER}" in answer.text
    assert text.startswith(answer.text.replace("\N{REPLACEMENT CHARACTER}", ""))


# Cancelling


def assert_idle(runner: RunnerProcess) -> None:
    pong = runner.ping()
    assert (pong.slots_busy, pong.queued) == (0, 0)


def test_cancel_while_generating(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", num_ctx=4096, slots=1)
    request_id = runner.submit("hello", num_predict=-1)
    runner.until(lambda: bool(runner.answers[request_id].texts))
    runner.cancel(request_id)
    assert runner.answer(request_id).failure.kind == Failed.KIND_CANCELLED
    assert_idle(runner)
    assert runner.ask("hello", num_predict=2).text == " one two"
    assert runner.answers[request_id].terminals == 1


def test_cancel_while_the_prompt_is_read(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", num_ctx=4096, slots=1, num_batch=1)
    request_id = runner.submit(" ".join(["the"] * 4000))
    runner.until(lambda: runner.answers[request_id].started is not None)
    runner.cancel(request_id)
    assert runner.answer(request_id).failure.kind == Failed.KIND_CANCELLED
    assert not runner.answers[request_id].texts
    assert_idle(runner)
    # What was read before is right, and of use.
    after = runner.ask(" ".join(["the"] * 4000) + "!", num_predict=2)
    assert after.text == " one two"


def test_cancel_while_waiting(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", num_ctx=4096, slots=1)
    first = runner.submit("hello", num_predict=-1)
    second = runner.submit("hello there", num_predict=-1)
    runner.until(lambda: bool(runner.answers[first].texts))
    runner.cancel(second)
    assert runner.answer(second).failure.kind == Failed.KIND_CANCELLED
    assert runner.answers[second].started is None
    runner.cancel(first)
    runner.answer(first)
    assert_idle(runner)


def test_cancel_while_the_template_renders(runner: RunnerProcess, models: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    runner.load(models / "loop.gguf", template=endless, template_timeout_s=30.0)
    busy = runner.submit(chat=[("user", "a")])
    waiting = runner.submit(chat=[("user", "b")])
    assert runner.ping().queued == 2
    runner.cancel(waiting)
    runner.cancel(busy)
    assert runner.answer(waiting).failure.kind == Failed.KIND_CANCELLED
    assert runner.answer(busy).failure.kind == Failed.KIND_CANCELLED
    assert_idle(runner)


def test_cancel_of_what_is_not_there_is_ignored(script: RunnerProcess) -> None:
    request_id = script.submit("hello")
    script.answer(request_id)
    script.cancel(request_id)
    script.cancel(99_999)
    assert script.ping().slots_busy == 0
    assert script.answers[request_id].terminals == 1


def test_cancelling_a_few_of_many_leaves_the_others_right(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "tiny.gguf", slots=4, num_batch=8)
    expected = runner.ask(STORY, num_predict=40, scope="alone").text
    ids = [runner.submit(STORY, num_predict=40, scope=f"{index}") for index in range(12)]
    for request_id in ids[::3]:
        runner.cancel(request_id)
    answers = [runner.answer(request_id) for request_id in ids]
    assert all(answer.terminals == 1 for answer in answers)
    assert {answer.text for answer in answers if answer.finished} == {expected}


# Prefix cache


def test_a_repeated_prompt_is_reused_up_to_its_last_token(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "tiny.gguf")
    first = runner.ask(STORY, num_predict=30)
    second = runner.ask(STORY, num_predict=30)
    assert first.done.cached_tokens == 0
    assert second.done.cached_tokens == first.done.prompt_tokens - 1
    assert second.text == first.text
    assert second.started is not None
    assert second.started.cached_tokens == second.done.cached_tokens


@pytest.mark.parametrize("name", ["tiny", "wide", "gemma", "mamba"])
def test_reuse_never_changes_an_answer(runner: RunnerProcess, models: Path, name: str) -> None:
    path = models / f"{name}.gguf"
    runner.load(path, slots=2)
    base = runner.ask(STORY, num_predict=30)
    prompts = [STORY + base.text, STORY, STORY[:40], STORY + base.text[:50] + " but", STORY + " and so"]
    warm = [runner.ask(prompt, num_predict=30) for prompt in prompts]
    if name != "mamba":
        assert any(answer.done.cached_tokens for answer in warm)
    for prompt, answer in zip(prompts, warm, strict=True):
        cold = runner.ask(prompt, num_predict=30, scope=prompt)
        assert cold.done.cached_tokens == 0
        assert cold.text == answer.text


@pytest.mark.parametrize("name", ["gemma", "mamba"])
def test_a_memory_that_cannot_be_cut_is_still_continued(runner: RunnerProcess, models: Path, name: str) -> None:
    runner.load(models / f"{name}.gguf")
    first = runner.ask(STORY, num_predict=0)
    longer = runner.ask(STORY + " and the house", num_predict=20)
    assert longer.done.cached_tokens == first.done.prompt_tokens
    assert longer.text == runner.ask(STORY + " and the house", num_predict=20, scope="cold").text


def test_a_window_that_has_moved_on_is_not_reused(runner: RunnerProcess, models: Path) -> None:
    """The sliding window of 16 tokens is gone from the beginning of a long prompt, so nothing can start there."""
    runner.load(models / "gemma.gguf", num_batch=16)
    runner.ask(" ".join(["the", "people"] * 60), num_predict=2)
    short = " ".join(["the", "people"] * 12) + " went"
    answer = runner.ask(short, num_predict=20)
    assert answer.text == runner.ask(short, num_predict=20, scope="cold").text


def test_a_busy_slot_shares_what_it_has_read(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "wide.gguf", num_ctx=4096, num_batch=32)
    alone = runner.ask(STORY + " and", num_predict=20, scope="other").text
    busy = runner.submit(STORY, num_predict=3000)
    runner.until(lambda: bool(runner.answers[busy].texts))
    second = runner.ask(STORY + " and", num_predict=20)
    runner.cancel(busy)
    assert runner.answer(busy).failure.kind == Failed.KIND_CANCELLED
    started = runner.answers[busy].started
    assert started is not None
    assert second.done.cached_tokens == started.prompt_tokens
    assert second.text == alone


def test_prompts_that_begin_alike_are_read_once(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "wide.gguf", num_ctx=1024, slots=8, num_batch=32)
    shared = runner.ask(LONG, num_predict=0, scope="count").done.prompt_tokens
    ids = [runner.submit(f"{LONG} {end}", num_predict=10) for end in ("we", "they", "people", "water")]
    answers = [runner.answer(request_id) for request_id in ids]
    assert [answer.done.cached_tokens >= shared - 1 for answer in answers] == [False, True, True, True]
    for end, answer in zip(("we", "they", "people", "water"), answers, strict=True):
        assert answer.text == runner.ask(f"{LONG} {end}", num_predict=10, scope=end).text


def test_the_leader_of_prompts_that_begin_alike_may_be_cancelled(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "wide.gguf", num_ctx=1024, slots=4, num_batch=1)
    ids = [runner.submit(f"{LONG} {end}", num_predict=3) for end in ("we", "they")]
    runner.until(lambda: runner.answers[ids[0]].started is not None)
    runner.cancel(ids[0])
    assert runner.answer(ids[1]).done.generated_tokens == 3


def test_scopes_share_nothing(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "tiny.gguf")
    runner.ask(STORY, num_predict=5, scope="mine")
    assert runner.ask(STORY, num_predict=5, scope="yours").done.cached_tokens == 0
    assert runner.ask(STORY, num_predict=5, scope="mine").done.cached_tokens > 0


# Sampling


def test_a_seed_makes_sampling_repeatable(tiny: RunnerProcess) -> None:
    def text(seed: int, **options: Any) -> str:
        return tiny.ask(STORY, num_predict=30, temperature=1.5, seed=seed, **options).text

    assert text(1) == text(1)
    assert text(1) != text(2)
    for mirostat in (1, 2):
        options: dict[str, Any] = {"mirostat": mirostat, "mirostat_tau": 5.0, "mirostat_eta": 0.1}
        assert text(1, **options) == text(1, **options)
        assert text(1, **options) != text(2, **options)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"typical_p": 1e-6, "top_k": 1}])
def test_samplers_that_leave_one_token_are_greedy(tiny: RunnerProcess, options: dict[str, Any]) -> None:
    greedy = tiny.ask(STORY, num_predict=30).text
    assert tiny.ask(STORY, num_predict=30, temperature=1.0, seed=5, **options).text == greedy


def test_penalties_see_the_end_of_the_prompt(script: RunnerProcess) -> None:
    """The model wants to say ` one` first; a penalty makes it avoid that only when the prompt holds it in reach."""
    options: dict[str, Any] = {"presence_penalty": 2.0, "repeat_penalty": 1000.0, "num_predict": 1}
    near, far = " one hello", " one" + " hello" * 20

    def first(prompt: str, last_n: int) -> str:
        return script.ask(prompt, repeat_last_n=last_n, **options).text

    assert first(near, 64) != " one"
    assert first(near, 0) == " one"
    assert first(far, 4) == " one"
    assert first(far, -1) != " one"


def test_penalties_see_the_answer(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf")
    plain = runner.ask("hello", num_predict=8).text
    penalized = runner.ask("hello", num_predict=8, repeat_last_n=64, presence_penalty=2.0, repeat_penalty=1000.0).text
    assert plain == " one two three four one two three four"
    assert penalized[:19] == plain[:19]
    assert penalized[19:23] != " one"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"mirostat": 3}, "mirostat"),
    ],
)
def test_nonsense_is_refused(tiny: RunnerProcess, options: dict[str, Any], words: str) -> None:
    failed = tiny.ask(STORY, **options).failure
    assert failed.kind == Failed.KIND_INVALID
    assert words in failed.message


def test_a_request_without_input_is_refused(tiny: RunnerProcess) -> None:
    assert tiny.ask().failure.kind == Failed.KIND_INVALID


def test_an_empty_prompt_begins_a_text(tiny: RunnerProcess) -> None:
    assert tiny.ask("", num_predict=5).done.prompt_tokens == 1


# Prompts and templates


def test_raw_prompts_may_spell_special_tokens(tiny: RunnerProcess) -> None:
    assert tiny.ask("<|im_start|><|im_end|>", num_predict=1).done.prompt_tokens == 3


def test_special_tokens_are_not_shown(runner: RunnerProcess, tmp_path: Path) -> None:
    path = make_scripted_llama(tmp_path / "s.gguf", [" one", "<|im_start|>", " two", "</s>"])
    runner.load(path)
    answer = runner.ask("hello")
    assert answer.text == " one two"
    assert answer.done.generated_tokens == 3


def test_a_chat_is_the_rendered_prompt(tiny: RunnerProcess) -> None:
    raw = "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    chat = tiny.ask(chat=[("system", "be good"), ("user", "hello")], num_predict=20, scope="chat")
    completion = tiny.ask(raw, num_predict=20, scope="raw")
    assert chat.text == completion.text
    assert chat.done.prompt_tokens == completion.done.prompt_tokens


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ bos_token }}{{ messages[0].content }}"])
def test_a_template_may_write_the_first_token_or_not(
    runner: RunnerProcess, models: Path, tiny: RunnerProcess, template: str
) -> None:
    runner.load(models / "raw.gguf", template=template)
    chat = runner.ask(chat=[("user", STORY)], num_predict=10)
    raw = runner.ask(STORY, num_predict=10, scope="raw")
    assert (chat.text, chat.done.prompt_tokens) == (raw.text, raw.done.prompt_tokens)


def test_no_first_token_where_the_model_wants_none(runner: RunnerProcess, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "m.gguf", add_bos=False, chat_template="{{ messages[0].content }}")
    runner.load(path)
    assert runner.ask("the", num_predict=1).done.prompt_tokens == 1
    assert runner.ask(chat=[("user", "the")], num_predict=1).done.prompt_tokens == 1


def test_a_model_without_a_template_does_not_chat(runner: RunnerProcess, models: Path) -> None:
    assert not runner.load(models / "raw.gguf").has_template
    assert runner.ask(chat=[("user", "hello")]).failure.kind == Failed.KIND_NO_TEMPLATE
    assert runner.children() == []


def test_a_failing_template_names_its_error(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", template="{{ raise_exception('roles must alternate') }}")
    failed = runner.ask(chat=[("user", "hello")]).failure
    assert failed.kind == Failed.KIND_TEMPLATE
    assert failed.message == "roles must alternate", "the daemon says what failed; it was once said twice"
    assert runner.ask("hello", num_predict=1).text == " one"


def test_a_rendered_prompt_has_a_limit(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", template="{{ messages[0].content * 1000 }}", max_prompt_bytes=1000)
    failed = runner.ask(chat=[("user", "hello")]).failure
    assert failed.kind == Failed.KIND_TEMPLATE
    assert "1000 bytes" in failed.message


def test_answers_go_on_while_a_hostile_template_burns(runner: RunnerProcess, models: Path) -> None:
    hostile = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if messages[0].content == 'boom' %}" + hostile + "{% endif %}{{ messages[0].content }}"
    runner.load(models / "loop.gguf", template=template, template_timeout_s=30.0)
    assert runner.ask(chat=[("user", "hello")], num_predict=1).text == " one"
    boom = runner.submit(chat=[("user", "boom")])
    for _ in range(20):
        assert runner.ask("hello", num_predict=4).text == " one two three four"
    runner.cancel(boom)
    assert runner.answer(boom).failure.kind == Failed.KIND_CANCELLED


def test_a_template_that_takes_too_long_is_ended(runner: RunnerProcess, models: Path) -> None:
    hostile = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if messages[0].content == 'boom' %}" + hostile + "{% endif %}{{ messages[0].content }}"
    runner.load(models / "loop.gguf", template=template, template_timeout_s=1.0)
    boom = runner.submit(chat=[("user", "boom")])
    after = runner.submit(chat=[("user", "hello")], num_predict=1)
    failed = runner.answer(boom).failure
    assert failed.kind == Failed.KIND_TEMPLATE
    assert "longer than 1 s" in failed.message
    assert runner.answer(after).text == " one"


# The process


def test_drain_finishes_what_runs_and_takes_no_more(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", num_ctx=4096, slots=1)
    ids = [runner.submit("hello", num_predict=500), runner.submit("hello there", num_predict=5)]
    runner.drain()
    late = runner.submit("hello")
    assert runner.answer(late).failure.kind == Failed.KIND_CANCELLED
    assert [runner.answer(request_id).done.generated_tokens for request_id in ids] == [500, 5]
    assert runner.wait() == 0


def test_drain_when_idle_ends_at_once(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "tiny.gguf")
    runner.ask(chat=[("user", "hi")], num_predict=1)
    (child,) = runner.children()
    runner.drain()
    assert runner.wait() == 0
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=20)
    assert not psutil.pid_exists(child)


def test_ends_when_the_daemon_hangs_up(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", num_ctx=4096)
    request_id = runner.submit("hello", num_predict=-1)
    runner.until(lambda: bool(runner.answers[request_id].texts))
    runner.socket.close()
    assert runner.wait() == 0


def test_dies_with_a_killed_daemon(models: Path, tmp_path: Path) -> None:
    """The stand-in for the daemon leaks its socket to a third process, so end of file alone would not tell."""
    program = """
        import subprocess, sys, time
        from pathlib import Path
        from tests.support.runner_client import RunnerProcess
        runner = RunnerProcess()
        runner.load(Path(sys.argv[1]))
        runner.ask(chat=[("user", "hi")], num_predict=1)
        keeper = subprocess.Popen(["sleep", "60"], pass_fds=[runner.socket.fileno()])
        print(runner.process.pid, runner.children()[0], keeper.pid, flush=True)
        time.sleep(60)
    """
    daemon = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(models / "tiny.gguf")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert daemon.stdout is not None
    with daemon.stdout:
        runner_pid, render_pid, keeper_pid = map(int, daemon.stdout.readline().split())
    processes = [psutil.Process(runner_pid), psutil.Process(render_pid)]
    try:
        daemon.kill()
        daemon.wait()
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    finally:
        os.kill(keeper_pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "data",
    [struct.pack(">I", (64 << 20) + 1), struct.pack(">I", 3) + b"\xff\xff\xff", struct.pack(">I", 0)],
    ids=["too long", "not a message", "empty"],
)
def test_a_broken_protocol_ends_it(runner: RunnerProcess, models: Path, data: bytes) -> None:
    runner.load(models / "tiny.gguf")
    runner.socket.sendall(data)
    assert runner.wait() == 2
    assert "the daemon sent" in runner.log()


def test_a_load_out_of_range_ends_it(runner: RunnerProcess, models: Path) -> None:
    runner.ask_load(models / "tiny.gguf", num_ctx=256, slots=65, num_batch=64)
    assert runner.wait() == 2


def test_pings_are_answered_while_it_works(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", num_ctx=4096, slots=1)
    request_id = runner.submit("hello", num_predict=3000)
    waiting = runner.submit("hello there", num_predict=1)
    runner.until(lambda: bool(runner.answers[request_id].texts))
    pong = runner.ping()
    assert (pong.slots_busy, pong.queued) == (1, 1)
    assert runner.answers[request_id].terminals == 0
    runner.answer(waiting)


def test_a_daemon_that_does_not_read_stops_nothing(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "loop.gguf", num_ctx=4096, slots=8, num_batch=64)
    ids = [runner.submit(f"hello {index}", num_predict=4000) for index in range(8)]
    process = psutil.Process(runner.process.pid)
    # Nothing is read until the runner has nothing left to do.
    wait_until_blocked(process)
    frames = runner.frames
    answers = [runner.answer(request_id) for request_id in ids]
    assert {answer.done.generated_tokens for answer in answers} == {4000}
    assert {answer.text for answer in answers} == {" one two three four" * 1000}
    assert runner.frames - frames < 8 * 4000 / 4, "texts share frames"


def wait_until_blocked(process: psutil.Process) -> None:
    deadline = time.monotonic() + 40
    before = None
    while (now := (process.num_ctx_switches().voluntary, process.cpu_times().user)) != before:
        assert time.monotonic() < deadline
        before = now
        time.sleep(0.2)


def test_idle_costs_nothing(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "tiny.gguf")
    runner.ask(chat=[("user", "hi")], num_predict=5)
    process = psutil.Process(runner.process.pid)
    wait_until_blocked(process)
    assert process.status() == psutil.STATUS_SLEEPING


def test_has_nothing_it_does_not_need(tiny: RunnerProcess) -> None:
    tiny.ask(chat=[("user", "hi")], num_predict=5)
    process = psutil.Process(tiny.process.pid)
    mapped = " ".join(region.path for region in process.memory_maps())
    # jinja2 itself is Python; markupsafe is the compiled module it cannot do without.
    assert "libllama" in mapped
    assert "markupsafe" not in mapped
    assert "numpy" not in mapped
    assert process.net_connections("inet") == []
    # A socketpair has no name, and what has none cannot be listened on.
    assert {str(connection.laddr) for connection in process.net_connections("unix")} == {""}
    assert len(process.children()) == 1


def test_the_engines_imports_bring_no_template_engine() -> None:
    program = """
        import sys
        import lmd.runner.main
        from lmd.runner.native import load_bindings
        load_bindings()
        print(*sorted({name.split(".")[0] for name in sys.modules}))
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    loaded = set(output.split())
    assert "llama_cpp" in loaded
    assert not loaded & {"jinja2", "markupsafe", "numpy", "grpc", "asyncio", "pydantic", "huggingface_hub", "urllib3"}


def test_is_confined(tiny: RunnerProcess) -> None:
    proc = Path(f"/proc/{tiny.process.pid}")
    core = next(line for line in (proc / "limits").read_text().splitlines() if line.startswith("Max core"))
    assert core.split()[4:6] == ["0", "0"]
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert int((proc / "oom_score_adj").read_text()) == min(own + 500, 1000)
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert int(status["SigIgn"], 16) & (1 << (signal.SIGINT - 1))


def test_openmp_is_told_not_to_spin(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libgomp reads its environment when it is loaded; this is its own report of what it read."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with RunnerProcess() as runner:
        runner.load(models / "tiny.gguf")
        assert "GOMP_SPINCOUNT = '1000'" in runner.log()
