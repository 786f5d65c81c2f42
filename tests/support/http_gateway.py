"""A gateway in the test's own event loop, and raw sockets to speak to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

from lmd.daemon.admission import Admission
from lmd.daemon.http.config import HttpConfig
from lmd.daemon.http.gateway import Gateway, HttpApplication
from lmd.daemon.http.listening import open_sockets
from tests.support.http_probe import HttpProbe
from tests.support.leaks import until


@dataclass
class Answer:
    """A response as it came over the wire, chunks joined."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    whole: bool = True

    def header(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key == name]
        assert len(found) <= 1, f"{name} came {len(found)} times"
        return found[0] if found else None


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @property
    def port(self) -> int:
        return int(self.writer.get_extra_info("sockname")[1])

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send a request and read its answer; underscores in the names of headers stand for hyphens."""
        lines = {"host": "localhost"} | {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            lines.setdefault("content-length", str(len(body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        await self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (body or b""))
        return await self.answer(head_only=method == "HEAD")

    async def answer(self, *, head_only: bool = False) -> Answer:
        """Read one answer to its end, or to the end of the connection."""
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split()[1])
            headers = [(name.lower(), value) for name, _, value in (line.partition(": ") for line in head[1:] if line)]
            answer = Answer(status, headers, b"")
            if head_only or status in (204, 304):
                return answer
            if answer.header("transfer-encoding") != "chunked":
                answer.body = await self.reader.readexactly(int(answer.header("content-length") or 0))
                return answer
            try:
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    answer.body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
            except asyncio.IncompleteReadError:
                answer.whole = False
            return answer

    async def ended(self) -> bytes:
        """Return what still comes before the server closes the connection."""
        async with asyncio.timeout(20):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    def abort(self) -> None:
        """Leave with a reset."""
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()


@dataclass
class Rig:
    """A running gateway around a probe."""

    gateway: Gateway
    probe: HttpProbe
    admission: Admission
    port: int
    clients: list[Client] = field(default_factory=list)

    async def connect(self, *, host: str = "127.0.0.1") -> Client:
        client = Client(*await asyncio.open_connection(host, self.port))
        self.clients.append(client)
        return client

    async def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Ask on a connection of its own."""
        return await (await self.connect()).request(method, path, body, **headers)

    async def idle(self) -> None:
        """Wait until no connection, no request, no stream and no place of the admission is left."""
        await until(
            lambda: (
                not self.gateway.connections
                and not self.gateway.requests
                and not self.probe.running
                and not self.probe.streams
                and not self.admission.running
            )
        )


def told(path: str, status: int, message: str) -> Response:
    return JSONResponse({"told": message}, status_code=status)


@asynccontextmanager
async def gateway(
    *,
    admission: Admission | None = None,
    max_connections: int = 10_000,
    serves: Callable[[int], bool] = lambda uid: True,
    change: Callable[[Gateway], None] | None = None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """Run a gateway; *settings* are those of `[http]`."""
    admission = admission or Admission()
    config = HttpConfig.model_validate({"listen": ["127.0.0.1:0"]} | settings, context={"user_home": "/"})
    probe = HttpProbe()
    running = Gateway(HttpApplication(probe, told), config, admission, max_connections=max_connections, serves=serves)
    if change is not None:
        change(running)
    sockets, problem = open_sockets(config.listen)
    assert not problem
    port = sockets[0].getsockname()[1]
    await running.start(sockets)
    rig = Rig(running, probe, admission, port)
    try:
        yield rig
    finally:
        for client in rig.clients:
            client.abort()
        await running.stop()
        assert not running.requests


def shrink_buffers(client: Client) -> None:
    """Make the kernel hold little for a client that does not read."""
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
