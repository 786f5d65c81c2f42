"""Keys and values in another type than the usual one, in real runner processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import RunnerProcess
from tests.support.tiny_models import make_tiny_gemma, make_tiny_llama

STORY = "we had a little house by the water and"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Its heads have 32 numbers, as many as share a scale."""
    return make_tiny_llama(tmp_path / "model.gguf", n_ctx=1024, n_embd=128, n_head=4)


@pytest.mark.parametrize(
    ("kv_type", "share"), [("f32", 2), ("bf16", 1), ("q8_0", 34 / 64), ("q5_0", 22 / 64), ("q4_0", 18 / 64)]
)
def test_the_context_takes_what_the_type_takes(model: Path, kv_type: str, share: float) -> None:
    with RunnerProcess() as usual, RunnerProcess() as other:
        expected = usual.load(model, num_ctx=1024).kv_bytes * share
        found = other.load(model, num_ctx=1024, kv_type=kv_type)
        # The engine prints MiB with two decimals.
        assert found.kv_bytes == pytest.approx(expected, abs=10_486)
        assert other.ask(STORY, num_predict=8).done.generated_tokens == 8


def test_answers_are_much_the_same(model: Path) -> None:
    with RunnerProcess() as usual, RunnerProcess() as other:
        usual.load(model)
        other.load(model, kv_type="q8_0")
        one, two = (runner.ask(STORY, num_predict=4).text for runner in (usual, other))
        assert one == two


def test_bytes_are_told_by_device(model: Path) -> None:
    with RunnerProcess() as runner:
        ready = runner.load(model)
        (main,) = ready.device_bytes
        assert main.device == "cpu"
        assert (main.weights_bytes, main.kv_bytes, main.compute_bytes) == (
            ready.weights_bytes,
            ready.kv_bytes,
            ready.compute_bytes,
        )
        assert 0 < ready.mapped_bytes == ready.weights_bytes


def test_heads_that_do_not_fit_fail_the_load(tmp_path: Path) -> None:
    """The daemon refuses such wishes before; what its table does not know, the engine says."""
    path = make_tiny_gemma(tmp_path / "gemma.gguf")
    with RunnerProcess() as runner:
        runner.ask_load(path, num_ctx=256, slots=1, num_batch=64, num_thread=1, kv_type="q8_0")
        runner.until(lambda: runner.load_failed is not None)
        assert runner.load_failed is not None
        assert runner.load_failed.kind == frames_pb2.LoadFailed.KIND_INCOMPATIBLE
        assert "does not divide n_embd_head_k=16" in runner.load_failed.message


def test_a_type_that_there_is_not_breaks_the_protocol(model: Path) -> None:
    with RunnerProcess() as runner:
        runner.ask_load(model, num_ctx=256, slots=1, num_batch=64, num_thread=1, kv_type="q9_9")
        assert runner.process.wait(20) == 2
        assert "the type 'q9_9'" in runner.log()


def told(who: str) -> str:
    return f"{who} " + "had a little house by the water and found another way to make it work " * 3


@pytest.mark.parametrize("kv_type", ["q8_0", "f32"])
def test_what_is_parked_and_saved_comes_back_in_its_type_and_no_other(
    model: Path, tmp_path: Path, kv_type: str
) -> None:
    """Several conversations do not fit the two slots, so that some are parked; all are saved and put back."""
    people = ["we", "they", "he", "she", "people"]
    with RunnerProcess() as runner:
        runner.load(model, slots=2, kv_dir=tmp_path, kv_type=kv_type)
        firsts = {who: runner.ask(told(who), scope="a", num_predict=8) for who in people}
        seconds = {}
        for who in people:
            seconds[who] = runner.ask(told(who) + firsts[who].text + " and", scope="a", num_predict=8)
            # The last pieces of a prompt can be others when text follows.
            assert seconds[who].done.cached_tokens >= firsts[who].done.prompt_tokens - 4
        runner.drain(save_s=20)
        assert runner.wait() == 0, runner.log()
    with RunnerProcess() as runner:
        runner.load(model, slots=2, kv_dir=tmp_path, kv_type=kv_type)
        again = runner.ask(told("we") + firsts["we"].text + " and", scope="a", num_predict=8)
        assert again.done.cached_tokens >= firsts["we"].done.prompt_tokens - 4
        assert again.text == seconds["we"].text
    with RunnerProcess() as runner:
        runner.load(model, slots=2, kv_dir=tmp_path, kv_type="f16")
        assert runner.ask(told("we"), scope="a", num_predict=8).done.cached_tokens == 0


@pytest.mark.parametrize(
    ("kv_type", "head", "shifts"),
    [
        ("f16", 32, True),
        ("f32", 32, True),
        ("q8_0", 64, True),
        # The engine would end the process.
        ("q8_0", 32, False),
        ("q4_0", 32, False),
        ("bf16", 64, False),
    ],
)
def test_a_full_context_goes_on_whether_keys_can_be_moved_or_not(
    tmp_path: Path, kv_type: str, head: int, shifts: bool
) -> None:
    path = make_tiny_llama(tmp_path / "model.gguf", n_ctx=1024, n_embd=128, n_head=128 // head)
    with RunnerProcess() as runner:
        assert runner.load(path, num_ctx=32, slots=1, kv_type=kv_type).shifts is shifts
        options = {"context_policy": frames_pb2.CONTEXT_POLICY_SHIFT}
        answer = runner.answer(runner.submit(STORY, num_predict=100, options=options))
        assert answer.done.generated_tokens == 100
        assert answer.done.shifted_tokens > 60
