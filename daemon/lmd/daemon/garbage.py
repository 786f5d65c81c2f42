"""Runs a collection of the store and hands its items on as they go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import structlog

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.tasks import give_up
from lmd.registry.store import GarbageItem, Store

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Collected:
    """The sums of a collection; *spared_items* are orphans younger than the grace period."""

    items: int
    freed_bytes: int
    spared_items: int


async def collect(
    store: Store, pool: BlockingPool, *, dry_run: bool, grace_s: float | None, history_s: float | None = None
) -> AsyncGenerator[GarbageItem | Collected]:
    """Yield each thing that went, or would go, then the sums.

    Closing the iterator ends the collection after the current batch. The collection never waits for a slow reader;
    items are small, so they wait instead.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[GarbageItem | None] = asyncio.Queue()
    cancelled = threading.Event()

    def work() -> Collected:
        collection = store.collect(dry_run=dry_run, grace_s=grace_s, history_s=history_s)
        count = freed_bytes = 0
        for item in collection:
            count += 1
            freed_bytes += item.size_bytes
            loop.call_soon_threadsafe(items.put_nowait, item)
            if cancelled.is_set():
                break
        return Collected(count, freed_bytes, collection.spared_items)

    task = asyncio.create_task(pool.run_cancellable(cancelled, work), name="collect")
    task.add_done_callback(lambda _: items.put_nowait(None))
    try:
        while (item := await items.get()) is not None:
            yield item
        result = task.result()
    finally:
        await give_up(task)
    if not dry_run:
        log.info("garbage_collected", items=result.items, freed_bytes=result.freed_bytes, spared=result.spared_items)
    yield result
