"""Sampling settings on their way through a real runner process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import RunnerProcess
from tests.support.tiny_models import make_scripted_llama, make_tiny_llama, tiny_vocab

Failed = frames_pb2.Failed
Finished = frames_pb2.Finished

STORY = "the people went to the house and saw that the water was great"
TWO, THREE, FOUR = (tiny_vocab().id_of(piece) for piece in (" two", " three", " four"))
TOKENS = len(tiny_vocab().pieces)

DRY: dict[str, Any] = {
    # Far above the distance between a scripted token and the rest, 29.
    "dry_multiplier": 50.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["\n", ":", '"', "*"],
}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunnerProcess]:
    """A runner with a model that answers ` one two three four` and ends."""
    path = make_scripted_llama(tmp_path_factory.mktemp("script") / "script.gguf", [" one", " two", " three", " four"])
    with RunnerProcess() as process:
        process.load(path)
        yield process


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunnerProcess]:
    """A runner with a random model."""
    path = make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with RunnerProcess() as process:
        process.load(path, slots=8)
        yield process


def test_a_bias_forces_a_token(script: RunnerProcess) -> None:
    assert script.ask("hello", logit_bias={THREE: 100.0}, num_predict=3).text == " three three three"


def test_a_bias_forbids_a_token(script: RunnerProcess) -> None:
    answer = script.ask("hello", logit_bias={TWO: -math.inf}, num_predict=20)
    assert answer.text.startswith(" one")
    assert " two" not in answer.text


def test_ignore_eos_goes_on(script: RunnerProcess) -> None:
    assert script.ask("hello").done.reason == Finished.REASON_STOP
    answer = script.ask("hello", ignore_eos=True, num_predict=20)
    assert answer.text.startswith(" one two three four")
    assert (answer.done.generated_tokens, answer.done.reason) == (20, Finished.REASON_LENGTH)


def test_a_stop_token_ends_and_is_not_shown(script: RunnerProcess) -> None:
    answer = script.ask("hello", stop_tokens=[FOUR, THREE])
    assert answer.text == " one two"
    assert (answer.done.generated_tokens, answer.done.reason, answer.done.stop) == (2, Finished.REASON_STOP, "")


def test_a_thousand_stop_texts(script: RunnerProcess) -> None:
    stops = [f"thr{index}" for index in range(999)]
    assert script.ask("hello", stop=stops).text == " one two three four"
    answer = script.ask("hello", stop=[*stops, "three f"])
    assert (answer.text, answer.done.stop) == (" one two ", "three f")


def test_dry_ends_a_loop(tmp_path: Path) -> None:
    path = make_scripted_llama(tmp_path / "loop.gguf", [" one", " two", " three", " four"], loop=True)
    with RunnerProcess() as runner:
        runner.load(path)
        plain = runner.ask("hello", num_predict=40).text
        assert plain == " one two three four" * 10
        dry = runner.ask("hello", num_predict=40, **DRY).text
        assert dry.startswith(" one two three four one two")
        assert not dry.startswith(" one two three four one two three four")
        # The prompt counts as well.
        assert not runner.ask(plain + " one two", num_predict=1, **DRY).text.startswith(" three")
        assert runner.ask(plain + " one two", num_predict=1).text == " three"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"logit_bias": {TOKENS: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"stop_tokens": [TOKENS]}, "stop_tokens"),
        ({"xtc_probability": math.nan}, "xtc_probability"),
        ({"dry_multiplier": 1.0, "dry_base": 0.0}, "dry_base"),
    ],
)
def test_what_cannot_be_is_refused_by_field(script: RunnerProcess, values: dict[str, Any], field: str) -> None:
    failed = script.ask("hello", **values).failure
    assert (failed.kind, failed.field) == (Failed.KIND_INVALID, field)
    assert field in failed.message


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "repeat_penalty": 1.2, "repeat_last_n": 64},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "presence_penalty": 0.5, "repeat_last_n": -1},
    {"temperature": 1.2, "xtc_probability": 0.5, "xtc_threshold": 0.05, **DRY},
    {"temperature": 1.2, "mirostat": 2, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "logit_bias": {TWO: 2.0}},
]


@pytest.mark.parametrize("values", SETTINGS)
def test_a_seed_says_the_same_alone_and_among_eight(tiny: RunnerProcess, values: dict[str, Any]) -> None:
    alone = tiny.ask(STORY, scope="alone", num_predict=40, seed=11, **values).text
    prompts = [STORY, *(f"{STORY} {index}" for index in range(7))]
    ids = [
        tiny.submit(prompt, scope=f"{index}", num_predict=40, seed=11, **values) for index, prompt in enumerate(prompts)
    ]
    assert tiny.answer(ids[0]).text == alone
    assert all(tiny.answer(request_id).done.generated_tokens for request_id in ids)
    if values["temperature"] > 0:
        assert tiny.ask(STORY, scope="alone", num_predict=40, seed=12, **values).text != alone
