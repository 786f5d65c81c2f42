"""A real runner that holds a draft model beside its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.runner_client import RunnerProcess
from tests.support.tiny_models import make_tiny_llama, make_tiny_mamba

STORY = "the people went to the house and saw that the water was great"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and drafts for it: one that says the same, one that does not, one that cannot draft."""
    directory = tmp_path_factory.mktemp("models")
    make_tiny_llama(directory / "model.gguf", n_idle=40)
    make_tiny_llama(directory / "same.gguf")
    make_tiny_llama(directory / "other.gguf", seed=2)
    make_tiny_mamba(directory / "mamba.gguf")
    return directory


@contextmanager
def drafting(models: Path, name: str) -> Iterator[RunnerProcess]:
    with RunnerProcess() as process:
        process.ask_load(
            models / "model.gguf",
            draft_paths=[str(models / name)],
            num_ctx=256,
            slots=2,
            num_batch=64,
            num_thread=1,
            use_mmap=True,
        )
        process.until(lambda: process.ready is not None or process.load_failed is not None)
        assert process.ready is not None, str(process.load_failed)
        yield process


@pytest.fixture(scope="module")
def plain(models: Path) -> Iterator[RunnerProcess]:
    with RunnerProcess() as process:
        process.load(models / "model.gguf", slots=2)
        yield process


@pytest.fixture(scope="module")
def helped(models: Path) -> Iterator[RunnerProcess]:
    with drafting(models, "same.gguf") as process:
        yield process


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_answer_is_the_same_and_most_of_it_was_drafted(
    plain: RunnerProcess, helped: RunnerProcess, temperature: float
) -> None:
    expected = plain.ask(STORY, num_predict=80, temperature=temperature, seed=3)
    found = helped.ask(STORY, num_predict=80, draft_num_predict=-1, temperature=temperature, seed=3)
    assert found.text == expected.text
    assert found.done.generated_tokens == expected.done.generated_tokens
    assert 0 < found.done.accepted_tokens <= found.done.drafted_tokens
    if not temperature:
        assert found.done.accepted_tokens == found.done.drafted_tokens > 20


def test_a_request_can_do_without(plain: RunnerProcess, helped: RunnerProcess) -> None:
    found = helped.ask(STORY, num_predict=20, draft_num_predict=0)
    assert found.text == plain.ask(STORY, num_predict=20).text
    assert found.done.drafted_tokens == 0


def test_a_poor_draft_is_given_up(models: Path, plain: RunnerProcess) -> None:
    with drafting(models, "other.gguf") as runner:
        found = runner.ask(STORY, num_predict=100, draft_num_predict=-1)
    assert found.text == plain.ask(STORY, num_predict=100).text
    assert 0 < found.done.drafted_tokens < 40


def test_its_memory_is_reported_with_the_models(plain: RunnerProcess, helped: RunnerProcess, models: Path) -> None:
    assert plain.ready is not None
    assert helped.ready is not None
    extra = helped.ready.weights_bytes - plain.ready.weights_bytes
    assert extra == pytest.approx((models / "same.gguf").stat().st_size, rel=0.1)
    layers, embd, f16_bytes = 2, 64, 2
    # One sequence, however many slots.
    kv_bytes = 2 * layers * embd * f16_bytes * 256
    assert helped.ready.kv_bytes - plain.ready.kv_bytes == pytest.approx(kv_bytes, rel=0.1)


@pytest.mark.parametrize(("name", "why"), [("mamba.gguf", "its state cannot take"), ("nowhere.gguf", "")])
def test_a_draft_that_the_engine_refuses_is_left_out(models: Path, plain: RunnerProcess, name: str, why: str) -> None:
    with drafting(models, name) as runner:
        found = runner.ask(STORY, num_predict=20, draft_num_predict=-1)
        assert f"nothing is drafted, for the draft model cannot be used: {why}" in runner.log()
    assert found.text == plain.ask(STORY, num_predict=20).text
    assert found.done.drafted_tokens == 0
