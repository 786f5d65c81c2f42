"""Streams that answer with their real status: the first chunk is made before the response begins."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


async def stream_response(
    events: AsyncGenerator[bytes, None], *, media_type: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response that sends the chunks of *events* as they come.

    Waits for the first one, so that what *events* raises before it becomes the answer of `endpoint`. What goes wrong
    after it is for *events* to tell, in its own format. *events* is closed when the stream is over, when the client
    leaves, and when it does not read (the server cancels the request then).
    """
    try:
        first = await anext(events, None)
    except BaseException:
        await events.aclose()
        raise
    return _ChunkStream(first, events, media_type=media_type, headers=headers)


class _ChunkStream(Response):
    """A response whose body comes in chunks; usable once."""

    def __init__(
        self,
        first: bytes | None,
        rest: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        headers: Mapping[str, str] | None,
    ) -> None:
        self._first = first
        self._rest = rest
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"cache-control": "no-store", **(headers or {})})
        # Not for a body: a length, which nobody knows yet.
        if "content-length" in self.headers:
            del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; waits while the client does not read."""
        async with aclosing(self._rest) as rest:
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            if self._first is not None:
                await send({"type": "http.response.body", "body": self._first, "more_body": True})
                async for chunk in rest:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
