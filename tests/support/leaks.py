"""Waiting for conditions, and looking for what a test left behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Return as soon as *condition* holds; TimeoutError at the deadline."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions of any kind, also outside this process
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def nothing_left_in(views: Path, *, more_descriptors: int = 0) -> Iterator[None]:
    """Fail when the block leaves a child process, a view, or more descriptors than *more_descriptors*."""
    me = psutil.Process()
    descriptors = me.num_fds()
    yield
    _, alive = psutil.wait_procs(me.children(recursive=True), timeout=10)
    assert not alive
    assert me.num_fds() <= descriptors + more_descriptors
    assert not views.exists() or not list(views.iterdir())
