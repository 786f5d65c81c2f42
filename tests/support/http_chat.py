"""Serves an adapter of the gateway over loopback, with answers that a test writes itself."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from lmd.daemon.answer_events import Event, Started
from lmd.daemon.conversations import Turn
from lmd.daemon.http.adapters import Adapter
from lmd.daemon.http.app import make_app
from lmd.daemon.http.callers import CALLER_KEY
from lmd.daemon.http.endpoint import RenderError
from lmd.daemon.http.services import Services
from lmd.daemon.tokenizing import Prompt, Tokens
from lmd.registry.errors import CapabilityMissing

Step = Event | Exception | asyncio.Event | Started


@dataclass
class ScriptedInference:
    """Stands in for `Inference`: yields the events of *script*, raises its errors, waits for its `asyncio.Event`s.

    A model that does not *think* refuses to, as the real one does.
    """

    script: Sequence[Step] = ()
    thinks: bool = True
    asked: dict[str, Any] = field(default_factory=dict)
    open_streams: int = 0

    async def chat(
        self, *, on_started: Callable[[Started], None] | None = None, **asked: Any
    ) -> AsyncGenerator[Event, None]:
        self.asked = asked
        think = asked.get("think")
        if not self.thinks and think is not None and think != "off":
            raise CapabilityMissing(asked["model"], "thinking")
        self.open_streams += 1
        try:
            for step in self.script:
                match step:
                    case Exception():
                        raise step
                    case asyncio.Event():
                        await step.wait()
                    case Started():
                        if on_started is not None:
                            on_started(step)
                    case _:
                        yield step
        finally:
            self.open_streams -= 1

    @property
    def turns(self) -> list[Turn]:
        return list(self.asked["messages"])


@dataclass
class ScriptedTokenizing:
    """Stands in for `Tokenizing`: every prompt has *tokens* tokens."""

    tokens: int = 0
    asked: dict[str, Any] = field(default_factory=dict)

    async def apply_template(self, **asked: Any) -> Prompt:
        self.asked = asked
        return Prompt("", Tokens(range(self.tokens), [b""] * self.tokens))


@dataclass
class Gateway:
    """An adapter that is served at *url*."""

    url: str
    inference: ScriptedInference
    tokenizing: ScriptedTokenizing


@contextlib.asynccontextmanager
async def served(*adapters: Adapter, renderers: dict[str, RenderError] | None = None) -> AsyncIterator[Gateway]:
    """Serve *adapters* to whoever connects, as one known caller."""
    inference, tokenizing = ScriptedInference(), ScriptedTokenizing()
    services = cast(Services, SimpleNamespace(inference=inference, tokenizing=tokenizing, version="1.2.3"))
    app = _as_caller(make_app(services, adapters, renderers or {}))
    config = uvicorn.Config(app, http="httptools", loop="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listener]))
            try:
                yield Gateway(f"http://127.0.0.1:{port}", inference, tokenizing)
            finally:
                server.should_exit = True


def _as_caller(app: ASGIApp) -> ASGIApp:
    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        scope[CALLER_KEY] = "uid:1000"
        await app(scope, receive, send)

    return called
