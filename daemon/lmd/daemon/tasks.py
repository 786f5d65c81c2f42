"""Tasks that are not lost track of."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await *work*, which goes on to its end even when this task is cancelled meanwhile; then so is this.

    For clean-up. A call is often cancelled while it cleans up already: a client that hangs up shows first as the end
    of its messages, and then as a cancellation.
    """
    task = asyncio.create_task(work, name="to_the_end")
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            # wait() leaves the task alone when this one is cancelled again.
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("clean_up_failed", error=str(error))
        raise


async def give_up(task: asyncio.Task[Any]) -> None:
    """Cancel *task* if it still runs, and return when it has ended; nobody asks for its outcome any more."""
    if not task.done():
        task.cancel()
        await to_the_end(_ended(task))
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("task_given_up", task=task.get_name(), error=type(error).__name__)


async def _ended(task: asyncio.Task[Any]) -> None:
    await asyncio.wait([task])


class TaskSet:
    """Tasks that nobody waits for one by one, and that still end before their owner does."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run *work*, which handles its own errors."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Return when all have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)
