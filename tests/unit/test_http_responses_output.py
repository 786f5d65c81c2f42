"""What is told of the making of a response adds up to the response, in the types of OpenAI's own client."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from lmd.daemon.answer_events import Delta, TokenLogprob
from lmd.daemon.conversations import ToolCall
from lmd.daemon.http.bodies import as_model
from lmd.daemon.http.openai.responses_output import ResponseBuilder
from lmd.daemon.http.openai.responses_requests import ResponseRequest
from tests.support.answer_streams import AnswerStream, answer_streams, done

Object = dict[str, Any]
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
KINDS = {"reasoning": "response.reasoning_summary_text", "message": "response.output_text"}


def builder(**fields: Any) -> ResponseBuilder:
    return ResponseBuilder(as_model({"model": "m", "input": "hi", **fields}, ResponseRequest), now_s=1)


def told(answer: AnswerStream, made: ResponseBuilder) -> list[Object]:
    events: list[Object] = made.begin()
    for delta in answer.deltas:
        events += made.add(delta)
    return events + made.finish(answer.done, now_s=2)


def add_up(events: list[Object]) -> list[Object]:
    """Return the items that the events tell of, made from their beginnings and deltas alone."""
    items: list[Object] = []
    for event in events:
        kind, index = event["type"], event.get("output_index", -1)
        if kind == "response.output_item.added":
            assert index == len(items)
            items.append(dict(event["item"]))
        elif kind in ("response.content_part.added", "response.reasoning_summary_part.added"):
            where = "content" if "content" in items[index] else "summary"
            items[index][where] = [dict(event["part"])]
        elif kind.endswith("arguments.delta"):
            items[index]["arguments"] += event["delta"]
        elif kind.endswith("text.delta"):
            part = (items[index].get("content") or items[index]["summary"])[0]
            part["text"] += event["delta"]
            if "logprobs" in event:
                part["logprobs"] = part["logprobs"] + event["logprobs"]
        elif kind == "response.output_item.done":
            items[index]["status"] = event["item"]["status"]
            assert items[index] == event["item"]
    return items


@given(answer_streams(), st.booleans())
def test_deltas_add_up_to_the_response(answer: AnswerStream, one_call: bool) -> None:
    made = builder(parallel_tool_calls=not one_call)
    events = told(answer, made)
    for event in events:
        EVENTS.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    cut = answer.done.finish_reason == "length"
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == ("response.incomplete" if cut else "response.completed")
    final = events[-1]["response"]
    assert final is made.response
    assert add_up(events) == final["output"]
    whole = Response.model_validate(final)
    assert whole.output_text == answer.text
    thoughts = [part.text for item in whole.output if item.type == "reasoning" for part in item.summary]
    assert "".join(thoughts) == answer.thinking
    called = [(item.call_id, item.name, item.arguments) for item in whole.output if item.type == "function_call"]
    expected = [(call.id, call.name, call.arguments) for call in answer.calls]
    assert called == (expected[:1] if one_call else expected)
    assert whole.status == ("incomplete" if cut else "completed")
    assert [item["status"] for item in final["output"][:-1]] == ["completed"] * (len(final["output"]) - 1)
    usage = whole.usage
    assert usage is not None
    assert usage.total_tokens == answer.done.prompt_tokens + answer.done.generated_tokens
    assert 0 <= usage.output_tokens_details.reasoning_tokens <= usage.output_tokens


@given(answer_streams())
def test_failure_keeps_what_was_said(answer: AnswerStream) -> None:
    made = builder()
    events: list[Object] = made.begin()
    for delta in answer.deltas:
        events += made.add(delta)
    events += made.fail("server_error", "it broke")
    for event in events:
        EVENTS.validate_python(event)
    assert events[-1]["type"] == "response.failed"
    final = Response.model_validate(events[-1]["response"])
    assert (final.status, final.error and final.error.message) == ("failed", "it broke")
    assert final.output_text == answer.text
    assert add_up(events) == events[-1]["response"]["output"]


def test_order_of_the_events() -> None:
    made = builder()
    delta = Delta("so", 3, thinking="hm", tool_calls=(ToolCall("call_1", "add", "{}"),))
    events = told(AnswerStream((delta,), done(finish_reason="tool_calls")), made)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_answer_without_anything_is_an_empty_message() -> None:
    made = builder()
    told(AnswerStream((), done()), made)
    (item,) = Response.model_validate(made.response).output
    assert item.type == "message"
    assert [part.type for part in item.content] == ["output_text"]


def test_answer_that_was_cut_says_so() -> None:
    made = builder()
    told(AnswerStream((Delta("half", 1),), done(finish_reason="length")), made)
    response = Response.model_validate(made.response)
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_log_probabilities_wait_for_their_text() -> None:
    made = builder()
    a, b, c = (TokenLogprob(n, bytes([97 + n]), -float(n), (TokenLogprob(9, b"\xff", -9.0),)) for n in range(3))
    made.add(Delta("", 1, logprobs=(a,), thinking="hm"))
    assert made.add(Delta("", 2, logprobs=(b,))) == []
    events = made.add(Delta("bc", 3, logprobs=(c,)))
    assert [entry["token"] for entry in events[-1]["logprobs"]] == ["b", "c"]  # type: ignore[attr-defined]
    made.finish(done(), now_s=2)
    (thoughts, message) = Response.model_validate(made.response).output
    assert thoughts.type == "reasoning"
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert [(entry.bytes, entry.logprob) for entry in part.logprobs or ()] == [([98], -1.0), ([99], -2.0)]
    assert part.logprobs is not None
    assert part.logprobs[0].top_logprobs[0].token == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, {"tool_choice": "auto", "tools": [], "text": {"format": {"type": "text"}}, "metadata": {}}),
        ({"tool_choice": "required"}, {"tool_choice": "required"}),
        (
            {"tool_choice": {"type": "function", "name": "f"}},
            {"tool_choice": {"type": "function", "name": "f"}},
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"a": 1}}}},
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"a": 1}}}},
        ),
        ({"metadata": {"k": "v"}, "instructions": "i"}, {"metadata": {"k": "v"}, "instructions": "i"}),
        ({"store": True, "parallel_tool_calls": False}, {"store": False, "parallel_tool_calls": False}),
    ],
)
def test_response_repeats_the_request(fields: Object, shown: Object) -> None:
    made = builder(**fields)
    Response.model_validate(made.response)
    assert {name: made.response[name] for name in shown} == shown
