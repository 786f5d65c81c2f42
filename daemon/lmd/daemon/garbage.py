"""Runs a collection of the store and hands its items on as they go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.tasks import give_up
from lmd.registry.store import GarbageItem, Store


async def collect(
    store: Store, pool: BlockingPool, *, dry_run: bool, grace_s: float | None
) -> AsyncIterator[GarbageItem]:
    """Yield each thing that went, or would go. Closing the iterator ends the collection after the current item.

    The collection never waits for a slow reader, since it may hold the store's locks; items are small, so they wait.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[GarbageItem | None] = asyncio.Queue()
    cancelled = threading.Event()

    def work() -> None:
        for item in store.collect(dry_run=dry_run, grace_s=grace_s):
            loop.call_soon_threadsafe(items.put_nowait, item)
            if cancelled.is_set():
                return

    task = asyncio.create_task(pool.run_cancellable(cancelled, work), name="collect")
    task.add_done_callback(lambda _: items.put_nowait(None))
    try:
        while (item := await items.get()) is not None:
            yield item
        task.result()
    finally:
        await give_up(task)
