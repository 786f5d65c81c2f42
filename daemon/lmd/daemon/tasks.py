"""Tasks that are not lost track of."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

log = structlog.get_logger(__name__)


async def give_up(task: asyncio.Task[Any]) -> None:
    """Cancel *task* if it still runs, and return when it has ended; nobody asks for its outcome any more."""
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("task_given_up", task=task.get_name(), error=type(error).__name__)


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
