"""`POST /v1/responses`: OpenAI's newer way to ask, without its memory of earlier responses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.answer_events import Delta, Done, Event
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import caller_of
from lmd.daemon.http.errors import status_of
from lmd.daemon.http.openai.errors import openai_endpoint
from lmd.daemon.http.openai.options import duration_of
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
from lmd.daemon.http.progress import done_headers, waiting_comment
from lmd.daemon.http.services import Services
from lmd.daemon.http.sse import MEDIA_TYPE, named_event
from lmd.daemon.http.streams import stream_response
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
    return inference.chat(
        model=body.model,
        messages=turns_of(body),
        tools=tools_of(body),
        think=think_of(body),
        parameters=parameters_of(body),
        keep_alive=duration_of(body.keep_alive, "keep_alive"),
        options=options_of(body),
        caller=caller,
    )


async def _whole(events: AsyncGenerator[Event, None], builder: ResponseBuilder) -> Response:
    headers: dict[str, str] = {}
    queue_position: int | None = None
    async with aclosing(events):
        async for event in events:
            match event:
                case Waiting() if queue_position is None:
                    queue_position = event.queue_position
                case Delta():
                    builder.add(event)
                case Done():
                    builder.finish(event, now_s=int(time.time()))
                    headers = done_headers(event, queue_position=queue_position)
    return JSONResponse(builder.response, headers=headers)


async def _stream(events: AsyncGenerator[Event, None], builder: ResponseBuilder) -> AsyncGenerator[bytes, None]:
    begun = False
    async with aclosing(events):
        try:
            async for event in events:
                if not begun:
                    begun = True
                    yield b"".join(map(named_event, builder.begin()))
                match event:
                    case Waiting():
                        yield waiting_comment(event)
                    case Delta():
                        if made := builder.add(event):
                            yield b"".join(map(named_event, made))
                    case Done():
                        yield b"".join(map(named_event, builder.finish(event, now_s=int(time.time()))))
        except LmdError as error:
            if not begun:
                raise
            yield b"".join(map(named_event, builder.fail(_code(error), _message(error))))


def _code(error: LmdError) -> str:
    """Return OpenAI's word for a failure after the start; its client knows no others."""
    if error.reason == "QUEUE_FULL":
        return "rate_limit_exceeded"
    return "invalid_prompt" if status_of(error) < 500 else "server_error"


def _message(error: LmdError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message
