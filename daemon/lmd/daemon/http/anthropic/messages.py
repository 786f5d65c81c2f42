"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.answer_events import Delta, Done, Event, Started
from lmd.daemon.conversations import Think
from lmd.daemon.http.anthropic.conversation import options_of, parameters_of, think_of, tools_of, turns_of
from lmd.daemon.http.anthropic.errors import error_event, new_request_id, render_error
from lmd.daemon.http.anthropic.output import MessageBuilder
from lmd.daemon.http.anthropic.requests import CountRequest, MessageRequest
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import caller_of, http_caller
from lmd.daemon.http.durations import duration_of
from lmd.daemon.http.endpoint import Handler, endpoint
from lmd.daemon.http.progress import WaitingComments, done_headers
from lmd.daemon.http.services import Services
from lmd.daemon.http.sse import MEDIA_TYPE, named_events, told
from lmd.daemon.http.streams import stream_response
from lmd.daemon.http.thinking import think_if_it_can
from lmd.daemon.inference import Inference
from lmd.daemon.residency.values import Waiting
from lmd.daemon.tokenizing import Prompt, Tokenizing
from lmd.registry.errors import CapabilityMissing

Answer = Callable[[Request, str], Awaitable[Response]]


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return what answers here."""

    async def create(request: Request, request_id: str) -> Response:
        body = await read_model(request, MessageRequest)
        answer = _Answer(services.inference, body, caller_of(request))
        if body.stream:
            return await stream_response(answer.stream(request_id), media_type=MEDIA_TYPE)
        return await answer.whole()

    async def count(request: Request, request_id: str) -> Response:
        body = await read_model(request, CountRequest)
        prompt = await _prompt(services.tokenizing, body, request)
        return JSONResponse({"input_tokens": len(prompt.tokens.ids)})

    return [
        Route("/v1/messages", _with_request_id(create), methods=["POST"]),
        Route("/v1/messages/count_tokens", _with_request_id(count), methods=["POST"]),
    ]


def _with_request_id(answer: Answer) -> Handler:
    """Return a handler whose responses, and errors within them, carry the same id of the request."""

    async def handle(request: Request) -> Response:
        request_id = new_request_id()

        async def answer_it(request: Request) -> Response:
            return await answer(request, request_id)

        handler = endpoint(
            answer_it, lambda status, message, error: render_error(status, message, error, request_id=request_id)
        )
        response = await handler(request)
        response.headers["request-id"] = request_id
        return response

    return handle


class _Answer:
    """The answer to one request, as a whole or as a stream."""

    def __init__(self, inference: Inference, body: MessageRequest, caller: str) -> None:
        choice = body.tool_choice
        self._builder = MessageBuilder(
            model=body.model,
            max_tokens=body.max_tokens,
            stop_sequences=body.stop_sequences or (),
            one_call=choice is not None and choice.disable_parallel_tool_use is True,
        )
        self._comments = WaitingComments()
        self._started: Started | None = None
        self._begun = False
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
                on_started=self._note_started,
            )

        adaptive = body.thinking is not None and body.thinking.type == "adaptive"
        self._events = think_if_it_can(chat, think_of(body)) if adaptive else chat(think_of(body))

    def _note_started(self, started: Started) -> None:
        self._started = started

    async def whole(self) -> Response:
        """Return the message."""
        headers: dict[str, str] = {}
        async with aclosing(self._events) as events:
            async for event in events:
                match event:
                    case Waiting():
                        self._comments.of(event)
                    case Delta():
                        self._builder.add(event)
                    case Done():
                        self._builder.finish(event)
                        headers = done_headers(event, queue_position=self._comments.first_position)
        return JSONResponse(self._builder.message, headers=headers)

    async def stream(self, request_id: str) -> AsyncGenerator[bytes, None]:
        """Yield the events of the message, and an error as the last one where it comes after the first."""
        begun = False
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    if chunk := self._chunk(event):
                        yield chunk
                        begun = True
            except Exception as error:  # the boundary: the status is out, so the stream itself has to tell
                if not begun:
                    raise
                yield named_events([error_event(told(error), request_id)])

    def _chunk(self, event: Event) -> bytes:
        if isinstance(event, Waiting):
            return self._comments.of(event)
        made: list[dict[str, object]] = []
        if not self._begun:
            self._begun = True
            assert self._started is not None, "an answer starts before there is any of it"
            made += self._builder.begin(self._started)
        made += self._builder.add(event) if isinstance(event, Delta) else self._builder.finish(event)
        return named_events(made)


async def _prompt(tokenizing: Tokenizing, body: CountRequest, request: Request) -> Prompt:
    """Return the prompt that a message with this body would be answered to."""
    turns, tools, think = turns_of(body), tools_of(body), think_of(body)
    keep_alive = duration_of(body.keep_alive, "keep_alive")
    caller = http_caller(request)

    async def prompt(think: Think | None) -> Prompt:
        return await tokenizing.apply_template(
            model=body.model, messages=turns, tools=tools, think=think, keep_alive=keep_alive, caller=caller
        )

    try:
        return await prompt(think)
    except CapabilityMissing as error:
        adaptive = body.thinking is not None and body.thinking.type == "adaptive"
        if not adaptive or error.metadata["capability"] != "thinking":
            raise
    return await prompt(None)
