"""Turns the events of an answer into Ollama's stream of lines, or into its one object."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from starlette.responses import Response

from lmd.daemon.answer_events import Delta, Done, Event, TokenLogprob
from lmd.daemon.conversations import ToolCall
from lmd.daemon.http.ollama.failures import Translate, defect, refusing
from lmd.daemon.http.ollama.messages import calls_shown
from lmd.daemon.http.ollama.replies import NDJSON, ending, head, json_response, line, logprobs_shown
from lmd.daemon.http.progress import done_headers
from lmd.daemon.http.streams import stream_response
from lmd.daemon.outcomes import note_failure
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import LmdError

#: Makes the fields that hold the text, the thoughts and the calls of a piece of an answer.
Content = Callable[[str, str, list[dict[str, object]]], dict[str, object]]


def generate_content(text: str, thinking: str, calls: list[dict[str, object]]) -> dict[str, object]:
    """Return a piece of an answer as `/api/generate` has it."""
    return {"response": text, **_unless_empty(thinking, calls)}


def chat_content(text: str, thinking: str, calls: list[dict[str, object]]) -> dict[str, object]:
    """Return a piece of an answer as `/api/chat` has it."""
    return {"message": {"role": "assistant", "content": text, **_unless_empty(thinking, calls)}}


def _unless_empty(thinking: str, calls: list[dict[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    if thinking:
        fields["thinking"] = thinking
    if calls:
        fields["tool_calls"] = calls
    return fields


@dataclass(frozen=True)
class Telling:
    """How an answer is told.

    Attributes:
        model: the name as it was asked for.
        content: the shape of a piece.
        translate: how errors are told.
        last: what the last object has beside what it took, made of the whole text.
    """

    model: str
    content: Content
    translate: Translate
    last: Callable[[str], dict[str, object]] = lambda _text: {}


async def answer(events: AsyncGenerator[Event, None], telling: Telling, *, stream: bool) -> Response:
    """Return the answer to a request: as lines as it comes, or whole.

    Raises:
        Refusal: there is no answer, and nothing was sent.
    """
    with refusing(telling.translate):
        if stream:
            return await stream_response(_lines(events, telling), media_type=NDJSON)
        return await _whole(events, telling)


async def _lines(events: AsyncGenerator[Event, None], telling: Telling) -> AsyncGenerator[bytes, None]:
    """Yield the lines of an answer; an error after the first one is the last."""
    started, calls = False, 0
    text: list[str] = []
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    shown = calls_shown(event.tool_calls, calls)
                    calls += len(shown)
                    text.append(event.text)
                    content = telling.content(event.text, event.thinking, shown)
                    if event.logprobs:
                        content["logprobs"] = logprobs_shown(event.logprobs)
                    elif not (event.text or event.thinking or shown):
                        continue
                    yield line({**head(telling.model), **content, "done": False})
                    started = True
                elif isinstance(event, Done):
                    yield line(_end(event, telling, "".join(text), telling.content("", "", [])))
    except LmdError as error:
        if not started:
            raise
        note_failure(error)
        yield line({"error": telling.translate(error).message})
    except Exception as error:  # the boundary: a stream that has begun can only say so itself
        if not started:
            raise
        yield line({"error": defect(error).message})


async def _whole(events: AsyncGenerator[Event, None], telling: Telling) -> Response:
    """Return an answer when it is all there."""
    text: list[str] = []
    thinking: list[str] = []
    calls: list[ToolCall] = []
    logprobs: list[TokenLogprob] = []
    queue_position: int | None = None
    done: Done | None = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Waiting) and queue_position is None:
                queue_position = event.queue_position
            elif isinstance(event, Delta):
                text.append(event.text)
                thinking.append(event.thinking)
                calls += event.tool_calls
                logprobs += event.logprobs
            elif isinstance(event, Done):
                done = event
    assert done is not None, "an answer ends with one"
    content = telling.content("".join(text), "".join(thinking), calls_shown(calls, 0))
    last = _end(done, telling, "".join(text), content, logprobs)
    return json_response(last, headers=done_headers(done, queue_position=queue_position))


def _end(
    done: Done, telling: Telling, text: str, content: dict[str, object], logprobs: Iterable[TokenLogprob] = ()
) -> dict[str, object]:
    """Return the last object: of a stream, or the only one."""
    last = {**head(telling.model), **content, "done": True, **telling.last(text), **ending(done)}
    if shown := logprobs_shown(tuple(logprobs)):
        last["logprobs"] = shown
    return last
