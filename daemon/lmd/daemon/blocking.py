"""Runs blocking work (hashing, fsync, SQLite, HTTP) in threads, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class BlockingPool:
    """A bounded pool of threads.

    A call whose task is cancelled never starts if it still waits for a thread; if it runs already, the task waits
    for its end before the cancellation goes on. So nobody cleans up under a thread that still works, and a resource
    that is held around `run` is held for as long as it is used. Work that can take long takes an Event: use
    `run_cancellable`.
    """

    def __init__(self, workers: int, name: str = "blocking") -> None:
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix=name)

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *fn* in a thread, with the context variables of the caller."""
        return await self._finish(self._submit(partial(fn, *args, **kwargs)), None)

    async def run_cancellable(
        self, cancelled: threading.Event, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call *fn* in a thread; set *cancelled* when the task is cancelled, and wait until *fn* has seen it."""
        return await self._finish(self._submit(partial(fn, *args, **kwargs)), cancelled)

    def close(self) -> None:
        """Take no more work, drop what has not started, and return without waiting for what runs."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        return self._executor.submit(contextvars.copy_context().run, work)

    async def _finish(self, future: Future[T], cancelled: threading.Event | None) -> T:
        waiter = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            if cancelled is not None:
                cancelled.set()
            if not future.cancel():
                await _outlast(waiter)
            raise


async def _outlast(waiter: asyncio.Future[T]) -> None:
    """Wait until *waiter* is done, however often the task is cancelled meanwhile; its outcome is nobody's any more."""
    while not waiter.done():
        # wait() leaves the future alone when the task is cancelled again, and the loop goes on waiting.
        try:
            await asyncio.wait([waiter])
        except asyncio.CancelledError:
            continue
    if not waiter.cancelled():
        waiter.exception()
