"""How Ollama's answers are written."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lmd.daemon.answer_events import Done, TokenLogprob
from lmd.daemon.conversations import Tool, ToolCall, Turn
from lmd.daemon.errors import (
    ContextLengthExceeded,
    DeviceMemoryShort,
    Draining,
    QueueFull,
    RunnerCrashed,
    TemplateFailed,
)
from lmd.daemon.http.ollama.failures import answer_refusal, embed_refusal
from lmd.daemon.http.ollama.messages import calls_shown, tools_of, turns_of
from lmd.daemon.http.ollama.replies import encoded, ending, logprobs_shown, now_text
from lmd.daemon.http.ollama.requests import ChatMessage, ToolBody
from lmd.registry.errors import CapabilityMissing, InvalidRef, LmdError, ModelNotFound

DONE = Done(
    finish_reason="stop",
    prompt_tokens=7,
    cached_tokens=3,
    generated_tokens=5,
    total_ns=100,
    load_ns=0,
    queue_ns=4,
    prompt_ns=20,
    generate_ns=60,
    seed=1,
    stop="",
    dropped_messages=2,
)


def test_the_end_leaves_out_what_is_zero() -> None:
    end = ending(DONE)
    assert "load_duration" not in end
    assert {key: end[key] for key in end if key != "lmd"} == {
        "done_reason": "stop",
        "total_duration": 100,
        "prompt_eval_count": 7,
        "prompt_eval_duration": 20,
        "eval_count": 5,
        "eval_duration": 60,
    }
    assert end["lmd"] == {
        "cached_tokens": 3,
        "dropped_messages": 2,
        "dropped_tokens": 0,
        "shifted_tokens": 0,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "queue_duration": 4,
    }


def test_calls_of_functions_end_an_answer_as_everything_does() -> None:
    assert ending(replace(DONE, finish_reason="tool_calls"))["done_reason"] == "stop"
    assert ending(replace(DONE, finish_reason="length"))["done_reason"] == "length"


def test_times_are_as_go_writes_them() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,8}[1-9])?Z", now_text())


def test_text_is_not_escaped_and_never_breaks_the_answer() -> None:
    assert encoded({"response": "é\n"}) == '{"response":"é\\n"}'.encode()
    assert encoded({"model": "\ud800"}) == b'{"model":"?"}'


def test_logprobs_have_the_bytes_of_tokens() -> None:
    half = "é".encode()[:1]
    shown = logprobs_shown((TokenLogprob(1, half, -0.5, (TokenLogprob(2, b"x", -1.0),)), TokenLogprob(2, b"x", -1.0)))
    assert shown == [
        {
            "token": "�",
            "logprob": -0.5,
            "bytes": [0xC3],
            "top_logprobs": [{"token": "x", "logprob": -1.0, "bytes": [120]}],
        },
        {"token": "x", "logprob": -1.0, "bytes": [120]},
    ]


def test_calls_have_objects_for_arguments_and_ids() -> None:
    calls = [ToolCall("call_1", "f", '{"a": [1]}'), ToolCall("", "g", "")]
    first, second = calls_shown(calls, 3)
    assert first == {"id": "call_1", "function": {"index": 3, "name": "f", "arguments": {"a": [1]}}}
    assert second["function"] == {"index": 4, "name": "g", "arguments": {}}
    assert re.fullmatch(r"call_[a-z0-9]{8}", str(second["id"]))


def test_turns_and_functions_are_read() -> None:
    message = ChatMessage.model_validate(
        {
            "role": "Assistant",
            "thinking": "hm",
            "images": [],
            "tool_calls": [{"id": "x", "function": {"index": 0, "name": "f", "arguments": {"é": 1}}}],
        }
    )
    result = ChatMessage.model_validate({"role": "tool", "content": "4", "tool_name": "f", "tool_call_id": "x"})
    assert turns_of([message, result]) == [
        Turn("assistant", "", "hm", (ToolCall("x", "f", '{"é": 1}'),)),
        Turn("tool", "4", tool_name="f", tool_call_id="x"),
    ]
    tool = ToolBody.model_validate(
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    )
    found = tools_of([tool, ToolBody.model_validate({"type": "function", "function": {"name": "g"}})])
    assert found is not None
    assert found.tools == (Tool("f", "d", '{"type": "object"}'), Tool("g"))
    assert tools_of(None) is tools_of([]) is None


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InvalidRef("x", ref="a b"), 400, "invalid model name"),
        (ModelNotFound("m:latest"), 404, "model 'M' not found"),
        (CapabilityMissing("m:latest", "chat"), 400, '"M" does not support chat'),
        (CapabilityMissing("m:latest", "completion"), 400, '"M" does not support generate'),
        (CapabilityMissing("m:latest", "thinking"), 400, '"M" does not support thinking'),
        (CapabilityMissing("m:latest", "tools"), 400, "M does not support tools"),
        (CapabilityMissing("m:latest", "insert"), 400, "M does not support insert"),
        (
            QueueFull(limit=1, retry_after_s=2),
            503,
            "server busy, please try again.  maximum pending requests exceeded",
        ),
        (TemplateFailed("x"), 500, "the chat template fails: x"),
        (ContextLengthExceeded(prompt_tokens=9, context_tokens=8), 400, "the prompt has 9 tokens, the context holds 8"),
        (Draining(), 503, "the daemon is shutting down"),
        (DeviceMemoryShort("m", needed_bytes=2, free_bytes=1, device="cpu"), 503, "model `m` does not fit"),
        (
            RunnerCrashed("m", cause="signal 11", log="one\nggml: out of memory\n"),
            500,
            "the runner of model `m` died (signal 11): ggml: out of memory (",
        ),
    ],
)
def test_errors_of_answers(error: LmdError, status: int, said: str) -> None:
    refusal = answer_refusal("M")(error)
    assert refusal.status == status
    assert (refusal.retry_after_s is not None) == (status == 503 and not isinstance(error, DeviceMemoryShort))
    assert refusal.message.startswith(said)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InvalidRef("x", ref="a b"), 400, "invalid model name"),
        (ModelNotFound("m:latest"), 404, 'model "M" not found, try pulling it first'),
        (CapabilityMissing("m:latest", "embedding"), 400, '"M" does not support embedding'),
        (
            ContextLengthExceeded(prompt_tokens=9, context_tokens=8),
            400,
            "the input length exceeds the context length",
        ),
    ],
)
def test_errors_of_embeddings(error: LmdError, status: int, said: str) -> None:
    refusal = embed_refusal("M")(error)
    assert (refusal.status, refusal.message) == (status, said)
