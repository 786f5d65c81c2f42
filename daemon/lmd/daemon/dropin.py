"""Watches the drop-in folder: files put there become models, and go when the files go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import structlog
from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.dropin_folder import DropInFolder, Obstacle
from lmd.daemon.names import Names
from lmd.daemon.quantizer import Wanted
from lmd.daemon.settling import Timing
from lmd.daemon.tasks import give_up, to_the_end
from lmd.registry.digest import Digest
from lmd.registry.errors import LmdError, PullCancelled
from lmd.registry.store import Store, TagRecord

log = structlog.get_logger(__name__)

#: Not FileModified: a copy makes thousands, and closing the file makes the one that counts.
_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileDeletedEvent,
    DirCreatedEvent,
    DirMovedEvent,
    DirDeletedEvent,
]


class DropIn:
    """Keeps the models of the drop-in folder up to date while it runs.

    Events only say when to look; what to do follows from the folder as it is. Without inotify (no watches left, a
    network file system) the folder is looked at every so often.
    """

    def __init__(
        self,
        store: Store,
        names: Names,
        pool: BlockingPool,
        folder: Path,
        quantize: Callable[[Wanted, Collection[Digest]], Coroutine[Any, Any, TagRecord]],
        *,
        timing: Timing | None = None,
        folder_mode: int = 0o700,
    ) -> None:
        self._pool = pool
        self._folder = folder
        self._folder_mode = folder_mode
        self._timing = timing or Timing()
        self._quantize = quantize
        self._models = DropInFolder(store, names, folder, self._timing, self._quantized)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._quantizing: Future[TagRecord] | None = None
        self._cancelled = threading.Event()
        self._wake = asyncio.Event()
        self._observer: BaseObserver | None = None
        self._watched_inode = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def problems(self) -> Mapping[str, str]:
        """Why files in the folder are no models, by their path below it."""
        return self._models.problems

    @property
    def waiting(self) -> Mapping[str, str]:
        """What files in the folder wait for, by their path below it."""
        return self._models.waiting

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        """Both of them, in the order of the files."""
        return self._models.obstacles

    async def start(self) -> None:
        """Make the folder if there is none, and begin with what lies in it."""
        self._loop = asyncio.get_running_loop()
        await self._pool.run(self._folder.mkdir, mode=self._folder_mode, parents=True, exist_ok=True)
        self._task = asyncio.create_task(self._run(), name="dropin")

    async def stop(self) -> None:
        """Stop watching; an import under way is given up and begins anew at the next start."""
        self._cancelled.set()
        if (quantizing := self._quantizing) is not None:
            quantizing.cancel()
        if self._task is not None:
            await give_up(self._task)
        await to_the_end(self._pool.run(self._unwatch))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            wait_s = self._timing.rescan_s
            try:
                await self._pool.run(self._watch, loop)
                wait_s = await self._pool.run_cancellable(self._cancelled, self._models.reconcile, self._cancelled)
            except LmdError as error:
                log.warning("dropin_failed", error=error.message, reason=error.reason)
            except Exception:
                # A defect met in one file must not end the service for the others.
                log.exception("dropin_defect")
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _quantized(self, wanted: Wanted, given: Collection[Digest]) -> TagRecord:
        """Have a model quantized, for the folder's thread. Raises: PullCancelled, and as `Quantizer.quantize`."""
        assert self._loop is not None, "the folder is looked at after start() only"
        self._quantizing = working = asyncio.run_coroutine_threadsafe(self._quantize(wanted, given), self._loop)
        if self._cancelled.is_set():
            working.cancel()  # stop() may have looked before there was anything to cancel
        try:
            return working.result()
        except CancelledError:
            raise PullCancelled("the daemon stops") from None
        finally:
            self._quantizing = None

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch the folder, anew when it is another directory than before."""
        try:
            inode = self._folder.stat().st_ino
        except OSError:
            return
        if inode == self._watched_inode:
            return
        self._unwatch()
        observer = Observer()
        try:
            observer.schedule(_Waker(loop, self._wake), str(self._folder), recursive=True, event_filter=_EVENTS)
            observer.start()
        except OSError as error:
            # As a rule the user's inotify watches are used up; the regular look at the folder remains.
            log.warning("dropin_not_watched", folder=str(self._folder), error=error.strerror)
            return
        self._observer, self._watched_inode = observer, inode

    def _unwatch(self) -> None:
        observer, self._observer, self._watched_inode = self._observer, None, 0
        if observer is not None:
            observer.stop()
            observer.join()


class _Waker(FileSystemEventHandler):
    """Wakes the loop for every event, from the observer's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: asyncio.Event) -> None:
        self._loop = loop
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Say that something happened; what it was, a look at the folder tells."""
        self._loop.call_soon_threadsafe(self._wake.set)
