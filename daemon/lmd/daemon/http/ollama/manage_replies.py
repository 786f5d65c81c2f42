"""How the routes that manage models answer: JSON, progress line by line, and refusals in Ollama's words."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmd.daemon.http.endpoint import Handler, endpoint
from lmd.daemon.http.errors import status_of
from lmd.daemon.http.ollama.failures import Refusal, Translate, defect, told
from lmd.daemon.http.ollama.replies import NDJSON, json_response, line, refused
from lmd.daemon.http.ollama.route import render_error
from lmd.daemon.http.streams import stream_response
from lmd.registry.digest import PREFIX, Digest
from lmd.registry.errors import InvalidRef, InvalidRequest, LmdError
from lmd.registry.ref import FileRef, ModelRef, parse_ref

Step = Mapping[str, object]


def managing(path: str, handler: Handler, methods: Sequence[str]) -> Route:
    """Return a route whose handler may raise `Refusal`; GET includes HEAD."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Refusal as refusal:
            return refused(refusal)

    return Route(path, endpoint(handle, render_error), methods=methods)


def as_it_is(error: LmdError) -> Refusal:
    """Return how errors are told where Ollama has no words for them."""
    if isinstance(error, InvalidRef):
        return Refusal(400, "invalid model name")
    return Refusal(status_of(error), told(error), retry_after_s=getattr(error, "retry_after_s", None))


def cut(text: str) -> str:
    """Return what a client sent in a length that is worth sending back."""
    return text if len(text) <= 200 else f"{text[:200]}…"


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
        return await stream_response(_lines(steps, translate), media_type=NDJSON)
    last: Step = {}
    async with aclosing(steps):
        try:
            async for step in steps:
                last = step
        except LmdError as error:
            raise translate(error) from error
    return json_response(last)


async def _lines(steps: AsyncGenerator[Step, None], translate: Translate) -> AsyncGenerator[bytes, None]:
    started = False
    async with aclosing(steps):
        try:
            async for step in steps:
                yield line(step)
                started = True
        except LmdError as error:
            refusal = translate(error)
            if not started:
                raise refusal from error
            yield line({"error": refusal.message})
        except Exception as error:  # the boundary: a stream that has begun can only say so itself
            if not started:
                raise
            yield line({"error": defect(error).message})
