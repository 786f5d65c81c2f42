"""Gaps are filled with the model's own tokens for that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import Answer, RunnerProcess
from tests.support.tiny_models import BOS, make_tiny_llama, tiny_vocab

MARKS = ("<PRE>", "<SUF>", "<MID>")
PRE, SUF, MID = (tiny_vocab(specials=MARKS).id_of(mark) for mark in MARKS)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunnerProcess]:
    path = make_tiny_llama(tmp_path_factory.mktemp("models") / "m.gguf", specials=MARKS, n_ctx=256)
    with RunnerProcess() as process:
        process.load(path, num_ctx=256)
        yield process


def fill(runner: RunnerProcess, prefix: str, suffix: str, policy: int = 0) -> Answer:
    insert = frames_pb2.Insert(prefix=prefix, suffix=suffix)
    return runner.ask(options={"insert": insert, "context_policy": policy}, num_predict=12)


def tokens_of(runner: RunnerProcess, text: str) -> list[int]:
    return list(runner.call(tokenize=frames_pb2.Tokenize(text=text, plain=True)).tokenized.tokens)


def as_tokens(runner: RunnerProcess, tokens: list[int]) -> Answer:
    return runner.ask(options={"tokens": frames_pb2.Tokens(ids=tokens)}, num_predict=12)


def test_the_prompt_is_prefix_suffix_middle(runner: RunnerProcess) -> None:
    # The text names a special token; in a document that is text.
    prefix, suffix = "the old house</s> is", "and the sea"
    expected = [BOS, PRE, *tokens_of(runner, prefix), SUF, *tokens_of(runner, suffix), MID]
    answer = fill(runner, prefix, suffix)
    assert answer.done.prompt_tokens == len(expected)
    assert answer.text == as_tokens(runner, expected).text
    assert answer.text != fill(runner, suffix, prefix).text


def test_a_side_may_be_empty(runner: RunnerProcess) -> None:
    only = tokens_of(runner, "the sea")
    assert fill(runner, "", "the sea").text == as_tokens(runner, [BOS, PRE, SUF, *only, MID]).text
    assert fill(runner, "the sea", "").text == as_tokens(runner, [BOS, PRE, *only, SUF, MID]).text


def test_what_is_too_long_fails_or_loses_what_is_farthest_from_the_gap(runner: RunnerProcess) -> None:
    prefix, suffix = " the house" * 200, " and sea" * 200
    failure = fill(runner, prefix, suffix).failure
    assert failure.kind == frames_pb2.Failed.KIND_CONTEXT_LENGTH
    before, after = tokens_of(runner, prefix), tokens_of(runner, suffix)
    assert failure.prompt_tokens == len(before) + len(after) + 4
    answer = fill(runner, prefix, suffix, frames_pb2.CONTEXT_POLICY_TRUNCATE)
    room = 256 - 12 - 4
    kept = [BOS, PRE, *before[-(room - room // 4) :], SUF, *after[: room // 4], MID]
    assert answer.done.prompt_tokens == len(kept) == 256 - 12
    assert answer.done.dropped_tokens == len(before) + len(after) - room
    assert answer.text == as_tokens(runner, kept).text
    # A short side leaves its room to the other.
    answer = fill(runner, "the old", suffix, frames_pb2.CONTEXT_POLICY_TRUNCATE)
    old = tokens_of(runner, "the old")
    assert answer.text == as_tokens(runner, [BOS, PRE, *old, SUF, *after[: room - len(old)], MID]).text


def test_long_texts_are_tokenized_beside_the_engine(runner: RunnerProcess) -> None:
    answer = fill(runner, " the house" * 5000, " and sea" * 5000, frames_pb2.CONTEXT_POLICY_TRUNCATE)
    assert answer.done.prompt_tokens == 256 - 12


def test_a_model_without_the_tokens_refuses(tmp_path: Path) -> None:
    with RunnerProcess() as process:
        process.load(make_tiny_llama(tmp_path / "m.gguf", specials=MARKS[:2]), num_ctx=256)
        failure = fill(process, "the", "sea").failure
        assert (failure.kind, failure.field) == (frames_pb2.Failed.KIND_CAPABILITY, "insert")
        assert process.ask("the house", num_predict=2).done.generated_tokens == 2
