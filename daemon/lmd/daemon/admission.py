"""Decides whether a call may begin while the daemon shuts down, and knows when the last one is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from lmd.daemon.errors import Draining
from lmd.daemon.rpc_handlers import AroundInterceptor

#: Calls that only look, and the one that ends the daemon: answered to the last, and never waited for.
_LOOKING = (
    "/lmd.v1.SystemService/",
    "/lmd.v1.RuntimeService/ListRunners",
    "/lmd.v1.RuntimeService/WatchRunners",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.",
)


class Admission:
    """The door of the daemon: open, then draining (running calls go on, new ones are refused), then expired.

    Used from the event loop only.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = asyncio.Event()
        self._expired = False

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining.is_set()

    @property
    def running(self) -> int:
        """Calls that are being answered."""
        return len(self._running)

    def drain(self) -> None:
        """Refuse new work from now on."""
        self._draining.set()

    async def wait_draining(self) -> None:
        """Return when draining begins."""
        await self._draining.wait()

    async def wait_idle(self) -> None:
        """Return when no call runs."""
        await self._idle.wait()

    def expire(self) -> None:
        """Cut the calls that still run; their callers see DRAINING."""
        self._draining.set()
        self._expired = True
        for task in self._running:
            task.cancel()

    @asynccontextmanager
    async def admit(self, *, looks: bool) -> AsyncIterator[None]:
        """Count a call while it runs; one that only *looks* is let through always, and not counted.

        Raises:
            Draining: at once, when new work is refused; later, when the time of running calls is over.
        """
        if looks:
            yield
            return
        if self.draining:
            raise Draining
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if self._expired:
                task.uncancel()
                raise Draining from None
            raise
        finally:
            self._running.discard(task)
            if not self._running:
                self._idle.set()

    @asynccontextmanager
    async def _admit_rpc(self, method: str, context: Any) -> AsyncIterator[None]:
        async with self.admit(looks=method.startswith(_LOOKING)):
            yield

    def interceptor(self) -> AroundInterceptor:
        """Return the interceptor that counts and refuses calls; the error interceptor belongs outside of it."""
        return AroundInterceptor(self._admit_rpc)
