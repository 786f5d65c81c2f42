"""An HTTP application for tests of the gateway: it tells who asks, echoes, streams, and hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from lmd.daemon.http.adapters import render_plain
from lmd.daemon.http.bodies import read_body, read_json
from lmd.daemon.http.callers import caller_of
from lmd.daemon.http.endpoint import Handler, endpoint
from lmd.daemon.http.streams import stream_response


class HttpProbe:
    """An ASGI application; counts what runs in it."""

    def __init__(self) -> None:
        self.begun = 0
        self.running = 0
        self.streams = 0
        self.sent_bytes = 0
        self.bodies: list[bytes] = []
        self.release = asyncio.Event()
        handlers: dict[str, Handler] = {
            "who": self._who,
            "echo": self._echo,
            "json": self._json,
            "hang": self._hang,
            "stream": self._stream,
            "late": self._late,
            "flood": self._flood,
            "ignore": self._ignore,
            "release": self._release,
            "defect": self._defect,
        }
        methods = ["GET", "POST", "DELETE"]
        self._router = Router(
            [
                Route(f"/{name}", endpoint(self._counted(run), render_plain), methods=methods)
                for name, run in handlers.items()
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._router(scope, receive, send)

    def _counted(self, run: Handler) -> Handler:
        async def counted(request: Request) -> Response:
            self.begun += 1
            self.running += 1
            try:
                return await run(request)
            finally:
                self.running -= 1

        return counted

    async def _who(self, request: Request) -> Response:
        return JSONResponse({"caller": caller_of(request)})

    async def _echo(self, request: Request) -> Response:
        body = await read_body(request)
        self.bodies.append(body)
        return Response(body, media_type="application/octet-stream")

    async def _json(self, request: Request) -> Response:
        return JSONResponse(await read_json(request))

    async def _hang(self, request: Request) -> Response:
        await read_body(request)
        await self.release.wait()
        return Response("released")

    async def _stream(self, request: Request) -> Response:
        """Send one chunk, and the last one on release."""

        async def chunks() -> AsyncGenerator[bytes]:
            yield b"first\n"
            await self.release.wait()
            yield b"last\n"

        return await self._streaming(chunks())

    async def _late(self, request: Request) -> Response:
        """Send the first chunk on release."""

        async def chunks() -> AsyncGenerator[bytes]:
            await self.release.wait()
            yield b"first\n"

        return await self._streaming(chunks())

    async def _flood(self, request: Request) -> Response:
        """Send without end."""

        async def chunks() -> AsyncGenerator[bytes]:
            chunk = b"x" * 16384
            while True:
                yield chunk
                self.sent_bytes += len(chunk)
                await asyncio.sleep(0)

        return await self._streaming(chunks())

    async def _ignore(self, request: Request) -> Response:
        """Answer without reading the body."""
        return Response("ignored")

    async def _release(self, request: Request) -> Response:
        """Let what hangs go on."""
        self.release.set()
        return Response("released")

    async def _defect(self, request: Request) -> Response:
        raise ZeroDivisionError("a defect")

    async def _streaming(self, chunks: AsyncGenerator[bytes]) -> Response:
        async def counted() -> AsyncGenerator[bytes]:
            self.streams += 1
            try:
                async with aclosing(chunks):
                    async for chunk in chunks:
                        yield chunk
            finally:
                self.streams -= 1

        return await stream_response(counted(), media_type="application/x-ndjson")
