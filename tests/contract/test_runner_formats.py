"""Answers in a format, from a real runner whose model says anything at all unless it is held to one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import Answer, RunnerProcess
from tests.support.tiny_models import CHATML, make_tiny_llama

Failed = frames_pb2.Failed
STOP = frames_pb2.Finished.REASON_STOP
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunnerProcess]:
    path = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", chat_template=CHATML, n_ctx=512)
    with RunnerProcess() as process:
        process.load(path, num_ctx=512)
        yield process


def ask(runner: RunnerProcess, prompt: str = "the house", *, choices: int = 1, **options: Any) -> Answer:
    format_ = frames_pb2.Format(**{key: options.pop(key) for key in ("json_schema", "regex", "gbnf") if key in options})
    sampling = {"temperature": 1.0, "num_predict": 300, **options}
    return runner.answer(runner.submit(prompt, options={"format": format_, "choices": choices}, **sampling))


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_what_its_schema_says(runner: RunnerProcess, seed: int) -> None:
    answer = ask(runner, json_schema=json.dumps(PERSON), seed=seed)
    assert answer.done.reason == STOP
    person = json.loads(answer.text)
    assert set(person) == {"name", "age"}
    assert 0 <= person["age"] <= 99


@pytest.mark.parametrize("lookup", [False, True])
def test_guesses_and_formats_go_together(runner: RunnerProcess, lookup: bool) -> None:
    answer = ask(runner, regex="(ab){40}", prompt_lookup=lookup, draft_num_predict=-1)
    assert answer.text == "ab" * 40
    assert answer.done.reason == STOP
    assert (answer.done.accepted_tokens > 0) == lookup


def test_several_answers_each_keep_the_format(runner: RunnerProcess) -> None:
    answer = ask(runner, choices=4, gbnf='root ::= "the " ("old" | "new") " house" [0-9]', seed=3)
    for number in range(4):
        assert re.fullmatch("the (old|new) house[0-9]", answer.choice_text(number))


def test_an_answer_ends_when_it_is_complete_although_the_end_is_forbidden(runner: RunnerProcess) -> None:
    answer = ask(runner, regex="yes|no", ignore_eos=True)
    assert answer.text in ("yes", "no")
    assert answer.done.reason == STOP


def test_what_is_wrong_with_a_format_is_said(runner: RunnerProcess) -> None:
    for format_, said in (
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "uniqueItems"),
        ({"json_schema": "{"}, "line 1"),
        ({"regex": "(a"}, "regular expression"),
        ({"gbnf": "root ::= missing"}, "missing"),
    ):
        (kind, text), *_ = format_.items()
        failure = runner.answer(
            runner.submit("the house", options={"format": frames_pb2.Format(**{kind: text})})  # type: ignore[arg-type]
        ).failure
        assert failure.kind == Failed.KIND_INVALID
        assert failure.field == "format"
        assert said in failure.message
    assert runner.ask("the people", num_predict=3).done.generated_tokens == 3


def test_others_go_on_while_a_format_is_compiled_and_a_request_can_be_taken_back(runner: RunnerProcess) -> None:
    schema = json.dumps({"enum": [f"number {index}" for index in range(3000)]})
    format_ = frames_pb2.Format(json_schema=schema)
    waiting = runner.submit("the house", options={"format": format_}, num_predict=50)
    runner.cancel(waiting)
    assert runner.answer(waiting).failure.kind == Failed.KIND_CANCELLED
    assert runner.ask("the people", num_predict=3).done.generated_tokens == 3
