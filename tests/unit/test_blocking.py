from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator

import pytest

from lmd.daemon.blocking import BlockingPool


@pytest.fixture
def pool() -> Iterator[BlockingPool]:
    pool = BlockingPool(1)
    yield pool
    pool.close()


async def started(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


async def test_results_and_errors_come_back(pool: BlockingPool) -> None:
    assert await pool.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await pool.run(divmod, 7, 0)


async def test_context_variables_reach_the_thread(pool: BlockingPool) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("seen")
    assert await pool.run(variable.get) == "seen"


async def test_a_cancelled_task_outlasts_the_work_that_runs(pool: BlockingPool) -> None:
    """A lease released while its thread still writes would let the collector remove what is being written."""
    running, go_on = threading.Event(), threading.Event()
    finished: list[str] = []

    def work() -> None:
        running.set()
        go_on.wait(10)
        finished.append("work")

    async def hold() -> None:
        try:
            await pool.run(work)
        finally:
            finished.append("cleanup")

    task = asyncio.create_task(hold())
    await started(running)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # also a second cancellation must not break the wait
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished == ["work", "cleanup"]


async def test_work_that_waits_for_a_thread_never_starts_once_cancelled(pool: BlockingPool) -> None:
    running, go_on = threading.Event(), threading.Event()
    ran: list[int] = []

    def occupy() -> None:
        running.set()
        go_on.wait(10)

    first = asyncio.create_task(pool.run(occupy))
    await started(running)
    second = asyncio.create_task(pool.run(ran.append, 1))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go_on.set()
    await first
    assert await pool.run(list, ran) == []


async def test_long_work_is_told_that_it_is_cancelled(pool: BlockingPool) -> None:
    running, cancelled = threading.Event(), threading.Event()

    def work() -> bool:
        running.set()
        return cancelled.wait(10)

    task = asyncio.create_task(pool.run_cancellable(cancelled, work))
    await started(running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled.is_set()
