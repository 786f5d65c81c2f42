"""Ends tasks without losing track of them."""

from __future__ import annotations

import asyncio
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
