"""How the events of an answer become Ollama's lines, or its one object."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from starlette.responses import Response

from lmd.daemon.answer_events import Delta, Done, Event, TokenLogprob
from lmd.daemon.conversations import ToolCall
from lmd.daemon.errors import EngineFailed
from lmd.daemon.http.ollama.answers import Telling, answer, chat_content, generate_content
from lmd.daemon.http.ollama.failures import Refusal, answer_refusal
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import ModelNotFound

DONE = Done("stop", 7, 3, 5, 100, 9, 4, 20, 60, 1, "")
FAILED = EngineFailed("m:latest", "no room", log="")
CALLED = (
    Delta("a", 1),
    Delta("", 2),
    Delta("", 3, tool_calls=(ToolCall("x", "f", "{}"),)),
    Delta("", 4, tool_calls=(ToolCall("y", "g", '{"n": 1}'),)),
    Delta("b", 5, thinking="hm"),
)


class Source:
    """Gives events, raises the errors among them, and notes that it was closed."""

    def __init__(self, *events: Event | Exception) -> None:
        self.closed = False
        self._events = events

    async def __call__(self) -> AsyncGenerator[Event, None]:
        try:
            for event in self._events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed = True


TELLING = Telling("M", chat_content, answer_refusal("M"))


async def body_of(response: Response) -> bytes:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    await response({"type": "http"}, receive, send)
    return b"".join(message.get("body", b"") for message in sent)


async def lines_of(*events: Event | Exception, telling: Telling = TELLING) -> list[Any]:
    response = await answer(Source(*events)(), telling, stream=True)
    body = await body_of(response)
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


async def test_lines_tell_what_is_new() -> None:
    said, first, second, thought, last = await lines_of(Waiting(1), *CALLED, DONE)
    assert said["message"] == {"role": "assistant", "content": "a"}
    assert [call["function"]["index"] for call in first["message"]["tool_calls"]] == [0]
    assert second["message"]["tool_calls"] == [
        {"id": "y", "function": {"index": 1, "name": "g", "arguments": {"n": 1}}}
    ]
    assert thought["message"] == {"role": "assistant", "content": "b", "thinking": "hm"}
    assert last["message"] == {"role": "assistant", "content": ""}
    assert [line["done"] for line in (said, first, second, thought, last)] == [False] * 4 + [True]


async def test_one_object_tells_all() -> None:
    response = await answer(Source(Waiting(2), Waiting(1), *CALLED, DONE)(), TELLING, stream=False)
    made = json.loads(await body_of(response))
    assert made["message"]["content"] == "ab"
    assert made["message"]["thinking"] == "hm"
    assert [call["function"]["index"] for call in made["message"]["tool_calls"]] == [0, 1]
    assert (made["done"], made["eval_count"], made["load_duration"]) == (True, 5, 9)
    assert response.headers["x-lmd-queue-position"] == "2"
    assert response.headers["x-lmd-prompt-tokens-cached"] == "3"


async def test_tokens_without_text_are_told_when_they_have_probabilities() -> None:
    token = TokenLogprob(1, b"\xc3", -0.5)
    *pieces, last = await lines_of(Delta("", 1, logprobs=(token,)), Delta("", 2), Delta("é", 3), DONE)
    assert [piece["message"]["content"] for piece in pieces] == ["", "é"]
    assert pieces[0]["logprobs"] == [{"token": "�", "logprob": -0.5, "bytes": [0xC3]}]
    assert "logprobs" not in last


async def test_the_last_object_may_know_the_whole_text() -> None:
    telling = Telling("M", generate_content, answer_refusal("M"), lambda text: {"context": [len(text)]})
    assert (await lines_of(*CALLED, DONE, telling=telling))[-1]["context"] == [2]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_line_has_its_status(stream: bool) -> None:
    source = Source(Waiting(1), ModelNotFound("m:latest"))
    with pytest.raises(Refusal) as refused:
        await answer(source(), TELLING, stream=stream)
    assert (refused.value.status, refused.value.message) == (404, "model 'M' not found")
    assert source.closed


async def test_an_error_later_is_the_last_line() -> None:
    said, failed = await lines_of(Delta("a", 1), FAILED)
    assert said["done"] is False
    assert list(failed) == ["error"]
    assert "no room" in failed["error"]


async def test_what_nobody_expected_is_told_without_details() -> None:
    _, failed = await lines_of(Delta("a", 1), RuntimeError("secret"))
    assert "error_id" in failed["error"]
    assert "secret" not in failed["error"]


async def test_a_client_that_leaves_ends_the_answer() -> None:
    source = Source(Delta("a", 1), Delta("b", 2), DONE)

    async def send(message: Any) -> None:
        if message.get("body"):
            raise ConnectionResetError

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    events = source()
    response = await answer(events, TELLING, stream=True)
    async with aclosing(events):
        with pytest.raises(ConnectionResetError):
            await response({"type": "http"}, receive, send)
        assert source.closed
