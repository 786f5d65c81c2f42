"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.answer_events import Delta, Done, Event, TokenLogprob
from lmd.daemon.conversations import Think, ToolCall
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import caller_of
from lmd.daemon.http.openai import messages, options
from lmd.daemon.http.openai.answers import Envelope, StreamEnvelope, chat_logprobs, finish_reasons
from lmd.daemon.http.openai.errors import openai_endpoint
from lmd.daemon.http.openai.requests import ChatRequest
from lmd.daemon.http.openai.streaming import told_errors
from lmd.daemon.http.progress import WaitingComments, done_headers
from lmd.daemon.http.services import Services
from lmd.daemon.http.streams import stream_response
from lmd.daemon.http.thinking import think_if_it_can
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import InvalidRequest

_FIRST_DELTA = {"role": "assistant", "content": "", "refusal": None}


def routes(services: Services) -> list[BaseRoute]:
    """Return the endpoint of chats."""

    async def chat(request: Request) -> Response:
        body = await read_model(request, ChatRequest)
        _refuse(body)
        events = _answer(services, body, caller_of(request))
        if body.stream:
            envelope = StreamEnvelope(
                "chatcmpl", "chat.completion.chunk", body.model, services.version, body.stream_options
            )
            chunks = told_errors(_stream(events, envelope, body))
            return await stream_response(chunks, media_type="text/event-stream")
        return await _whole(events, Envelope("chatcmpl", "chat.completion", body.model, services.version), body)

    return [Route("/v1/chat/completions", openai_endpoint(chat), methods=["POST"])]


def _refuse(body: ChatRequest) -> None:
    """Raise `InvalidRequest` for what would have to change the answer and cannot."""
    if body.modalities is not None and body.modalities != ["text"]:
        raise InvalidRequest('`modalities` must be ["text"]: models here write text only', field="modalities")
    for name in ("audio", "web_search_options"):
        if getattr(body, name) is not None:
            raise InvalidRequest(f"`{name}` is not supported", field=name, hint="leave it out")


def _answer(services: Services, body: ChatRequest, caller: str) -> AsyncGenerator[Event, None]:
    turns = messages.turns_of(body.messages)
    tools = messages.tools_of(body)
    parameters = options.parameters_of(body, max_tokens=options.max_tokens_of(body))
    keep_alive = options.keep_alive_of(body)
    wanted = options.options_of(
        body,
        response_format=body.response_format,
        top_logprobs=options.top_logprobs_of(body),
        defaults=options.CHAT_DEFAULTS,
    )

    def chat(think: Think | None) -> AsyncGenerator[Event, None]:
        return services.inference.chat(
            model=body.model,
            messages=turns,
            tools=tools,
            think=think,
            parameters=parameters,
            keep_alive=keep_alive,
            options=wanted,
            caller=caller,
        )

    return think_if_it_can(chat, options.think_of(body))


@dataclass(slots=True)
class _Choice:
    """What came of one choice so far."""

    index: int
    one_call: bool
    calls: int = 0
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, object]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, calls: tuple[ToolCall, ...]) -> list[tuple[int, ToolCall]]:
        """Return the calls that the client gets, with their numbers: one that takes one at a time gets the first."""
        first, self.calls = self.calls, self.calls + len(calls)
        return [(number, call) for number, call in enumerate(calls, first) if number == 0 or not self.one_call]

    def add(self, delta: Delta) -> None:
        """Keep a delta for the whole answer."""
        self.texts.append(delta.text)
        self.thoughts.append(delta.thinking)
        self.tool_calls += [_call(call) for _, call in self.take(delta.tool_calls)]
        self.logprobs += delta.logprobs

    def answer(self, finish_reason: str, *, with_logprobs: bool) -> dict[str, object]:
        """Return the choice as a whole answer has it."""
        text = "".join(self.texts)
        message: dict[str, object] = {
            "role": "assistant",
            "content": None if self.tool_calls and not text else text,
            "refusal": None,
        }
        if thinking := "".join(self.thoughts):
            message |= _thoughts(thinking)
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        logprobs = {"content": chat_logprobs(self.logprobs), "refusal": None} if with_logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def _choices(body: ChatRequest) -> list[_Choice]:
    return [_Choice(index, body.parallel_tool_calls is False) for index in range(body.n or 1)]


async def _whole(events: AsyncGenerator[Event, None], envelope: Envelope, body: ChatRequest) -> Response:
    choices = _choices(body)
    comments = WaitingComments()
    done: Done | None = None
    async with aclosing(events):
        async for event in events:
            match event:
                case Waiting():
                    comments.of(event)
                case Delta():
                    choices[event.choice].add(event)
                case Done():
                    done = event
    assert done is not None, "a stream of an answer ends with Done or an error"
    told = [
        choice.answer(reason, with_logprobs=bool(body.logprobs))
        for choice, reason in zip(choices, finish_reasons(done), strict=True)
    ]
    headers = done_headers(done, queue_position=comments.first_position)
    return Response(envelope.answer(told, [done]), headers=headers, media_type="application/json")


async def _stream(
    events: AsyncGenerator[Event, None], envelope: StreamEnvelope, body: ChatRequest
) -> AsyncGenerator[bytes, None]:
    choices = _choices(body)
    comments = WaitingComments()
    begun = False
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Waiting):
                if comment := comments.of(event):
                    yield comment
                continue
            chunks: list[bytes] = []
            if not begun:
                begun = True
                chunks += [_chunk(envelope, choice.index, dict(_FIRST_DELTA)) for choice in choices]
            if isinstance(event, Delta):
                chunks += [
                    _chunk(envelope, event.choice, delta, logprobs)
                    for delta, logprobs in _deltas(choices[event.choice], event)
                ]
            else:
                for choice, reason in zip(choices, finish_reasons(event), strict=True):
                    chunks.append(_chunk(envelope, choice.index, {}, finish_reason=reason))
                chunks += envelope.end([event])
            if chunks:
                yield b"".join(chunks)


def _chunk(
    envelope: StreamEnvelope,
    index: int,
    delta: dict[str, object],
    logprobs: tuple[TokenLogprob, ...] = (),
    finish_reason: str | None = None,
) -> bytes:
    told = {"content": chat_logprobs(logprobs), "refusal": None} if logprobs else None
    return envelope.chunk({"index": index, "delta": delta, "logprobs": told, "finish_reason": finish_reason})


def _deltas(choice: _Choice, delta: Delta) -> list[tuple[dict[str, object], tuple[TokenLogprob, ...]]]:
    """Return the parts of a delta, one kind in each; log probabilities go with the last that comes of tokens."""
    parts: list[dict[str, object]] = []
    if delta.thinking:
        parts.append(_thoughts(delta.thinking))
    if delta.text:
        parts.append({"content": delta.text})
    parts += [{"tool_calls": [{"index": number, **_call(call)}]} for number, call in choice.take(delta.tool_calls)]
    if not parts and delta.logprobs:
        # The text of these tokens is held back: it may be the beginning of a stop text or of a call.
        parts.append({"content": ""})
    return [(part, delta.logprobs if number == 0 else ()) for number, part in enumerate(parts)]


def _thoughts(text: str) -> dict[str, object]:
    """Return thoughts under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}


def _call(call: ToolCall) -> dict[str, object]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
