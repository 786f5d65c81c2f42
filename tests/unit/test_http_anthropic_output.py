"""What is told of the making of a message adds up to the message, in the types of Anthropic's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from lmd.daemon.answer_events import Delta, Started
from lmd.daemon.conversations import ToolCall
from lmd.daemon.http.anthropic.output import MessageBuilder
from tests.support.answer_streams import AnswerStream, answer_streams, done

Object = dict[str, Any]
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def builder(*, max_tokens: int = 100, one_call: bool = False) -> MessageBuilder:
    return MessageBuilder(model="m", max_tokens=max_tokens, stop_sequences=["END"], one_call=one_call)


def told(answer: AnswerStream, made: MessageBuilder) -> list[Object]:
    events: list[Object] = made.begin(Started(answer.done.prompt_tokens, answer.done.cached_tokens))
    for delta in answer.deltas:
        events += made.add(delta)
    return events + made.finish(answer.done)


def add_up(events: list[Object]) -> Object:
    """Return the message that the events tell of."""
    message = dict(events[0]["message"])
    content: list[Object] = message["content"]
    inputs: dict[int, str] = {}
    closed = True
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                assert closed
                assert event["index"] == len(content)
                content.append(dict(event["content_block"]))
                closed = False
            case "content_block_delta":
                assert not closed
                assert event["index"] == len(content) - 1
                kind = event["delta"]["type"]
                if kind == "input_json_delta":
                    inputs[event["index"]] = inputs.get(event["index"], "") + event["delta"]["partial_json"]
                else:
                    field = kind.removesuffix("_delta")
                    content[-1][field] += event["delta"][field]
            case "content_block_stop":
                assert event["index"] == len(content) - 1
                closed = True
            case "message_delta":
                assert closed
                message |= {**event["delta"], "usage": {**message["usage"], **event["usage"]}, "lmd": event["lmd"]}
    for index, text in inputs.items():
        content[index]["input"] = json.loads(text)
    return message


@given(answer_streams(), st.booleans())
def test_events_add_up_to_the_message(answer: AnswerStream, one_call: bool) -> None:
    made = builder(one_call=one_call)
    events = told(answer, made)
    for event in events:
        if event["type"] != "ping":
            EVENTS.validate_python(event)
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert add_up(events) == made.message
    message = Message.model_validate(made.message)
    assert "".join(block.text for block in message.content if block.type == "text") == answer.text
    assert "".join(block.thinking for block in message.content if block.type == "thinking") == answer.thinking
    called = [(block.id, block.name, block.input) for block in message.content if block.type == "tool_use"]
    expected = [(call.id, call.name, json.loads(call.arguments)) for call in answer.calls]
    assert called == (expected[:1] if one_call else expected)
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == answer.done.prompt_tokens
    assert usage.output_tokens == answer.done.generated_tokens
    assert events[0]["message"]["usage"]["input_tokens"] == usage.input_tokens


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (done(), ("end_turn", None)),
        (done(stop="END"), ("stop_sequence", "END")),
        # The model's own stop text is not what the request asked for.
        (done(stop="<|im_end|>"), ("end_turn", None)),
        (done(finish_reason="length", generated_tokens=100), ("max_tokens", None)),
        (done(finish_reason="length", generated_tokens=99), ("model_context_window_exceeded", None)),
        (done(finish_reason="tool_calls"), ("tool_use", None)),
    ],
)
def test_why_it_stopped(end: Any, expected: tuple[str, str | None]) -> None:
    made = builder()
    events = made.finish(end)
    message = Message.model_validate(made.message)
    assert (message.stop_reason, message.stop_sequence) == expected
    assert events[-2]["delta"] == {"stop_reason": expected[0], "stop_sequence": expected[1]}


def test_order_of_the_events() -> None:
    delta = Delta("so", 3, thinking="hm", tool_calls=(ToolCall("call_1", "add", '{"a": 1}'),))
    events = told(AnswerStream((delta,), done(finish_reason="tool_calls")), builder())
    assert [(event["type"], event.get("index")) for event in events] == [
        ("message_start", None),
        ("ping", None),
        *((f"content_block_{part}", index) for index in range(3) for part in ("start", "delta", "stop")),
        ("message_delta", None),
        ("message_stop", None),
    ]


def test_answer_without_anything_is_an_empty_text() -> None:
    made = builder()
    made.finish(done())
    (block,) = Message.model_validate(made.message).content
    assert block.type == "text"
