"""Work in threads that tells how far it is, as an iterator on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from lmd.daemon.latest import Latest
from lmd.daemon.tasks import give_up

T = TypeVar("T")

#: Bytes done, and in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Finished(Generic[T]):
    """What the work gave."""

    result: T


async def reports_of(
    work: Callable[[Progress], Awaitable[T]], name: str
) -> AsyncGenerator[tuple[int, int] | Finished[T]]:
    """Run *work*, which may report from any thread; yields the latest report at a bounded rate, and the result.

    Closing the iterator cancels the work and waits for its end. Raises: what *work* raises.
    """
    wake = asyncio.Event()
    news: list[tuple[int, int]] = []

    def deliver(_key: str, report: tuple[int, int]) -> None:
        news[:] = [report]
        wake.set()

    latest: Latest[tuple[int, int]] = Latest(deliver, urgent=lambda before, after: False)

    async def run() -> T:
        return await work(lambda done_bytes, total_bytes: latest.put("", (done_bytes, total_bytes)))

    task = asyncio.create_task(run(), name=name)
    task.add_done_callback(lambda _: wake.set())
    try:
        while not task.done():
            await wake.wait()
            wake.clear()
            while news:
                yield news.pop()
        result = task.result()
    finally:
        await give_up(task)
    yield Finished(result)
