"""Runs the gateway: uvicorn's protocol on sockets of ours, in the daemon's own event loop.

uvicorn's `Server` is not used: it takes over signals, wakes up ten times a second, and ends the process when it cannot
start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import uvicorn
from starlette.types import ASGIApp

from lmd.daemon.admission import Admission
from lmd.daemon.http.attribution import Attributor
from lmd.daemon.http.config import HttpConfig
from lmd.daemon.http.connection import Connection, Limits, State
from lmd.daemon.http.guard import Failure, Guard
from lmd.daemon.http.listening import BACKLOG

log = structlog.get_logger(__name__)

#: How long a connection that was told to close may take.
CLOSE_S = 5.0


@dataclass(frozen=True)
class HttpApplication:
    """What the gateway serves.

    *app* answers requests that have passed the guard; *failure* renders what the guard refuses; *watch* wraps the
    whole, guard and all, for whoever counts requests.
    """

    app: ASGIApp
    failure: Failure
    watch: Callable[[ASGIApp], ASGIApp] = lambda app: app


class Gateway:
    """Serves *application* on listening sockets; use once."""

    def __init__(
        self,
        application: HttpApplication,
        config: HttpConfig,
        admission: Admission,
        *,
        max_connections: int,
        serves: Callable[[int], bool],
    ) -> None:
        # What it says of clients is theirs, and what it says of itself we say better; defects are errors.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        guard = Guard(
            application.app, application.failure, config, admission, own_name=socket.gethostname(), serves=serves
        )
        self._state = State(
            limits=Limits(
                header_timeout_s=config.header_timeout.total_seconds(),
                body_timeout_s=config.body_timeout.total_seconds(),
                slow_reader_timeout_s=config.slow_reader_timeout.total_seconds(),
                max_connections=min(config.max_connections, max_connections),
                max_per_user=config.max_connections_per_user,
            ),
            attributor=Attributor(),
            on_idle=self._note_idle,
        )
        self._config = uvicorn.Config(
            application.watch(guard),
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=round(config.idle_timeout.total_seconds()),
        )
        self._config.load()
        self._servers: list[asyncio.Server] = []
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._state.connections)

    @property
    def requests(self) -> int:
        """How many requests are being answered."""
        return len(self._state.tasks)

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Serve from now on; the sockets are the gateway's to close."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            self._servers.append(await loop.create_server(self._accept, sock=sock, backlog=BACKLOG))

    async def stop(self) -> None:
        """Accept nothing any more, let answers that are written reach their clients, then cut what is left."""
        for server in self._servers:
            server.close()
        for connection in [*self._state.connections]:
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._idle.wait()
        for connection in [*self._state.connections]:
            connection.transport.abort()
        tasks = [*self._state.tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        self._state.attributor.close()

    def _accept(self) -> Connection:
        self._idle.clear()
        return Connection(self._config, self._state, {})

    def _note_idle(self) -> None:
        self._idle.set()
