"""`POST /v1/responses`: OpenAI's newer way to ask, without its memory of earlier responses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.answer_events import Delta, Done, Event
from lmd.daemon.conversations import Think
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import caller_of
from lmd.daemon.http.durations import duration_of
from lmd.daemon.http.errors import status_of
from lmd.daemon.http.openai.errors import openai_endpoint
from lmd.daemon.http.openai.responses_input import (
    options_of,
    parameters_of,
    refuse_state,
    think_of,
    tools_of,
    turns_of,
)
from lmd.daemon.http.openai.responses_output import ResponseBuilder
from lmd.daemon.http.openai.responses_requests import ResponseRequest
from lmd.daemon.http.progress import WaitingComments, done_headers
from lmd.daemon.http.services import Services
from lmd.daemon.http.sse import MEDIA_TYPE, named_events, told
from lmd.daemon.http.streams import stream_response
from lmd.daemon.http.thinking import think_if_it_can
from lmd.daemon.inference import Inference
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import LmdError


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return what answers here."""
    inference = services.inference

    async def create(request: Request) -> Response:
        body = await read_model(request, ResponseRequest)
        refuse_state(body)
        events = _events(inference, body, caller_of(request))
        builder = ResponseBuilder(body, now_s=int(time.time()))
        if body.stream:
            return await stream_response(_stream(events, builder), media_type=MEDIA_TYPE)
        return await _whole(events, builder)

    return [Route("/v1/responses", openai_endpoint(create), methods=["POST"])]


def _events(inference: Inference, body: ResponseRequest, caller: str) -> AsyncGenerator[Event, None]:
    turns, tools = turns_of(body), tools_of(body)
    parameters, options = parameters_of(body), options_of(body)
    keep_alive = duration_of(body.keep_alive, "keep_alive")

    def chat(think: Think | None) -> AsyncGenerator[Event, None]:
        return inference.chat(
            model=body.model,
            messages=turns,
            tools=tools,
            think=think,
            parameters=parameters,
            keep_alive=keep_alive,
            options=options,
            caller=caller,
        )

    return think_if_it_can(chat, think_of(body))


async def _whole(events: AsyncGenerator[Event, None], builder: ResponseBuilder) -> Response:
    headers: dict[str, str] = {}
    comments = WaitingComments()
    async with aclosing(events):
        async for event in events:
            match event:
                case Waiting():
                    comments.of(event)
                case Delta():
                    builder.add(event)
                case Done():
                    _finish(builder, event)
                    headers = done_headers(event, queue_position=comments.first_position)
    return JSONResponse(builder.response, headers=headers)


async def _stream(events: AsyncGenerator[Event, None], builder: ResponseBuilder) -> AsyncGenerator[bytes, None]:
    comments = WaitingComments()
    begun = started = False
    async with aclosing(events):
        try:
            async for event in events:
                if isinstance(event, Waiting):
                    chunk = comments.of(event)
                else:
                    made = [] if started else builder.begin()
                    started = True
                    made += builder.add(event) if isinstance(event, Delta) else _finish(builder, event)
                    chunk = named_events(made)
                if chunk:
                    yield chunk
                    begun = True
        except Exception as error:  # the boundary: the status is out, so the stream itself has to tell
            if not begun:
                raise
            failed = told(error)
            yield named_events([*([] if started else builder.begin()), *builder.fail(_code(failed), _message(failed))])


def _finish(builder: ResponseBuilder, done: Done) -> list[dict[str, object]]:
    return builder.finish(done, now_s=int(time.time()))


def _code(error: LmdError) -> str:
    """Return OpenAI's word for a failure after the start; its client knows no others."""
    if error.reason == "QUEUE_FULL":
        return "rate_limit_exceeded"
    return "invalid_prompt" if status_of(error) < 500 else "server_error"


def _message(error: LmdError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message
