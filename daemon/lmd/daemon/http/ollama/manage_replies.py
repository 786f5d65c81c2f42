"""How the routes that manage models answer: JSON, progress line by line, and refusals in Ollama's words."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import structlog
from starlette.requests import Request
from starlette.responses import Response

from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.endpoint import Handler, endpoint
from lmd.daemon.http.errors import status_of
from lmd.daemon.http.streams import stream_response
from lmd.registry.digest import PREFIX, Digest
from lmd.registry.errors import InvalidRef, InvalidRequest, LmdError
from lmd.registry.ref import FileRef, ModelRef, parse_ref

log = structlog.get_logger(__name__)

JSON_TYPE = "application/json; charset=utf-8"
LINES_TYPE = "application/x-ndjson"

Step = Mapping[str, object]


class Refusal(Exception):
    """Raised to answer with a status and a sentence of Ollama's own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


#: Says how an error is told by a route.
Translate = Callable[[LmdError], Refusal]


def managing(handler: Handler) -> Handler:
    """Return *handler* with everything it raises told in Ollama's way."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Refusal as refusal:
            return failure(refusal.status, refusal.message, None)

    return endpoint(handle, failure)


def failure(status: int, message: str, error: LmdError | BodyError | None) -> Response:
    """Return the answer to a request that failed."""
    return json_reply({"error": told(error) if isinstance(error, LmdError) else message}, status)


def json_reply(value: object, status: int = 200) -> Response:
    """Return an answer that is sent whole."""
    return Response(dump(value), status, media_type=JSON_TYPE)


def dump(value: object) -> bytes:
    """Return *value* as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def told(error: LmdError) -> str:
    """Return an error as one line for people: what was wrong, and what to do."""
    return f"{error.message} ({error.hint})" if error.hint else error.message


def as_it_is(error: LmdError) -> Refusal:
    """Return how errors are told where Ollama has no words for them."""
    if isinstance(error, InvalidRef):
        return Refusal(400, "invalid model name")
    return Refusal(status_of(error), told(error))


def model_ref(text: str) -> ModelRef:
    """Return the reference to a model that a client names.

    A path is none: which files of this machine there are is nobody's business here.

    Raises: InvalidRef.
    """
    ref = parse_ref(text)
    if isinstance(ref, FileRef):
        raise InvalidRef("a path is no model name", ref=text)
    return ref


def blob_digest(text: str) -> Digest:
    """Return a digest as Ollama's clients write it: `sha256-…` and capital letters are fine, too. Raises: Refusal."""
    algorithm, rest = text[: len(PREFIX)], text[len(PREFIX) :]
    try:
        return Digest.parse(PREFIX + rest.lower() if algorithm in (PREFIX, "sha256-") else text)
    except InvalidRequest:
        raise Refusal(400, "invalid digest format") from None


async def progress_reply(steps: AsyncGenerator[Step, None], *, stream: bool, translate: Translate) -> Response:
    """Return the answer that tells the steps of some work as they are done; without *stream* only the last one.

    *steps* is closed when the client leaves. Raises: Refusal for what *steps* raises before its first step, or at all.
    """
    if stream:
        return await stream_response(_lines(steps, translate), media_type=LINES_TYPE)
    last: Step = {}
    async with aclosing(steps):
        try:
            async for step in steps:
                last = step
        except LmdError as error:
            raise translate(error) from error
    return json_reply(last)


async def _lines(steps: AsyncGenerator[Step, None], translate: Translate) -> AsyncGenerator[bytes, None]:
    started = False
    async with aclosing(steps):
        try:
            async for step in steps:
                yield dump(step) + b"\n"
                started = True
        except LmdError as error:
            refusal = translate(error)
            if not started:
                raise refusal from error
            yield dump({"error": refusal.message}) + b"\n"
        except Exception as error:
            # Of an answer that has begun nothing but a line can tell of a defect.
            if not started:
                raise
            log.error("http_stream_failed", exc_info=error)
            yield dump({"error": "internal error in the daemon; its log has more"}) + b"\n"
