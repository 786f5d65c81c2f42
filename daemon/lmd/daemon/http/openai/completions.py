"""`POST /v1/completions`: texts to continue as they are, without the model's template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.answer_events import Delta, Done, Event, TokenLogprob
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import caller_of, http_caller
from lmd.daemon.http.openai import options
from lmd.daemon.http.openai.answers import Envelope, LegacyLogprobs, StreamEnvelope, finish_reasons
from lmd.daemon.http.openai.errors import openai_endpoint
from lmd.daemon.http.openai.requests import MAX_PROMPTS, CompletionRequest
from lmd.daemon.http.openai.streaming import told_errors
from lmd.daemon.http.progress import WaitingComments, done_headers
from lmd.daemon.http.services import Services
from lmd.daemon.http.streams import stream_response
from lmd.daemon.model_calls import Caller
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import InvalidRequest

#: Prompts of one request that are answered at once; the rest of them wait here and fill nobody's queue.
CONCURRENT_PROMPTS = 8

Prompt = str | Sequence[int]


def routes(services: Services) -> list[BaseRoute]:
    """Return the endpoint of completions."""

    async def complete(request: Request) -> Response:
        body = await read_model(request, CompletionRequest)
        _refuse(body)
        prompts = prompts_of(body)
        echoes = await _echoes(services, body, prompts, http_caller(request))
        answers = [_answer(services, body, prompt, caller_of(request)) for prompt in prompts]
        choices = [_choices(body, first=number * (body.n or 1), echo=echo) for number, echo in enumerate(echoes)]
        if body.stream:
            envelope = StreamEnvelope("cmpl", "text_completion", body.model, services.version, body.stream_options)
            chunks = told_errors(_stream(answers, choices, envelope))
            return await stream_response(chunks, media_type="text/event-stream")
        return await _whole(answers, choices, Envelope("cmpl", "text_completion", body.model, services.version))

    return [Route("/v1/completions", openai_endpoint(complete), methods=["POST"])]


def prompts_of(body: CompletionRequest) -> list[Prompt]:
    """Return the prompts of a request: texts, or lists of tokens.

    Raises:
        InvalidRequest: there is none, or too many.
    """
    given = body.prompt
    if given is None or given == []:
        raise InvalidRequest("`prompt` is missing", field="prompt")
    if isinstance(given, str) or isinstance(given[0], int):
        return [cast(Prompt, given)]
    if len(given) > MAX_PROMPTS:
        raise InvalidRequest(f"`prompt` has {len(given)} prompts; at most {MAX_PROMPTS} are legal", field="prompt")
    return list(cast(Sequence[Prompt], given))


def _refuse(body: CompletionRequest) -> None:
    """Raise `InvalidRequest` for what would have to change the answer and cannot."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(
            "`best_of` is not supported: every choice that is made is returned", field="best_of", hint="use `n`"
        )
    if body.echo and body.logprobs is not None:
        raise InvalidRequest(
            "`echo` with `logprobs` is not supported: prompts have no log probabilities here", field="echo"
        )


async def _echoes(services: Services, body: CompletionRequest, prompts: Sequence[Prompt], caller: Caller) -> list[str]:
    """Return what each answer begins with."""
    if not body.echo:
        return [""] * len(prompts)
    keep_alive = options.keep_alive_of(body)
    return [
        prompt
        if isinstance(prompt, str)
        else await services.tokenizing.detokenize(model=body.model, tokens=prompt, keep_alive=keep_alive, caller=caller)
        for prompt in prompts
    ]


def _answer(services: Services, body: CompletionRequest, prompt: Prompt, caller: str) -> AsyncGenerator[Event, None]:
    if body.suffix and not isinstance(prompt, str):
        raise InvalidRequest("`suffix` needs a prompt of text, not of tokens", field="suffix")
    suffix = body.suffix or ""
    return services.inference.generate(
        model=body.model,
        prompt=prompt if isinstance(prompt, str) else "",
        tokens=None if isinstance(prompt, str) else prompt,
        raw=not suffix,
        suffix=suffix,
        parameters=options.parameters_of(body, max_tokens=body.max_tokens),
        keep_alive=options.keep_alive_of(body),
        options=options.options_of(
            body,
            response_format=body.response_format,
            top_logprobs=body.logprobs,
            defaults=options.COMPLETION_DEFAULTS,
        ),
        caller=caller,
    )


@dataclass(slots=True)
class _Choice:
    """What came of one choice so far; *echo* is what it begins with."""

    index: int
    echo: str
    with_logprobs: bool
    legacy: LegacyLogprobs
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def told(self, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None = None) -> dict[str, object]:
        """Return the choice with some of its text, as an answer or a chunk has it."""
        told = self.legacy.of(logprobs) if self.with_logprobs and (logprobs or finish_reason is None) else None
        return {"text": text, "index": self.index, "logprobs": told, "finish_reason": finish_reason}

    def whole(self, finish_reason: str) -> dict[str, object]:
        """Return the choice as a whole answer has it."""
        return self.told(self.echo + "".join(self.texts), self.logprobs, finish_reason)


def _choices(body: CompletionRequest, *, first: int, echo: str) -> list[_Choice]:
    with_logprobs = body.logprobs is not None
    return [_Choice(first + number, echo, with_logprobs, LegacyLogprobs()) for number in range(body.n or 1)]


async def _whole(
    answers: Sequence[AsyncGenerator[Event, None]], choices: Sequence[Sequence[_Choice]], envelope: Envelope
) -> Response:
    comments = WaitingComments()
    room = asyncio.Semaphore(CONCURRENT_PROMPTS)

    async def collect(events: AsyncGenerator[Event, None], own: Sequence[_Choice]) -> Done:
        async with room, aclosing(events):
            async for event in events:
                match event:
                    case Waiting():
                        comments.of(event)
                    case Delta():
                        # A completion has no place for thoughts of its own; they are text as any other.
                        own[event.choice].texts.append(event.thinking + event.text)
                        own[event.choice].logprobs += event.logprobs
                    case Done():
                        return event
        raise AssertionError("a stream of an answer ends with Done or an error")

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(*pair)) for pair in zip(answers, choices, strict=True)]
    except ExceptionGroup as errors:
        # One prompt that fails fails the request, with its own error.
        raise errors.exceptions[0] from None
    ends = [task.result() for task in tasks]
    told = [
        choice.whole(reason)
        for done, own in zip(ends, choices, strict=True)
        for choice, reason in zip(own, finish_reasons(done), strict=True)
    ]
    headers = done_headers(ends[0], queue_position=comments.first_position) if len(ends) == 1 else None
    return Response(envelope.answer(told, ends), headers=headers, media_type="application/json")


async def _stream(
    answers: Sequence[AsyncGenerator[Event, None]], choices: Sequence[Sequence[_Choice]], envelope: StreamEnvelope
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of one prompt after the other."""
    comments = WaitingComments()
    ends: list[Done] = []
    for events, own in zip(answers, choices, strict=True):
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
                    chunks += [envelope.chunk(choice.told(choice.echo, ())) for choice in own if choice.echo]
                if isinstance(event, Delta):
                    text = event.thinking + event.text
                    if text or event.logprobs:
                        chunks.append(envelope.chunk(own[event.choice].told(text, event.logprobs)))
                else:
                    ends.append(event)
                    for choice, reason in zip(own, finish_reasons(event), strict=True):
                        chunks.append(envelope.chunk(choice.told("", (), reason)))
                if chunks:
                    yield b"".join(chunks)
    yield b"".join(envelope.end(ends))
