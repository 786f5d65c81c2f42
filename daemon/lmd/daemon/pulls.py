"""The pulls of the daemon: one per model at a time, with any number of watchers.

A pull belongs to the daemon, not to the caller that asked for it first. Who asks for a model that is being pulled
joins that pull. A watcher that leaves takes nothing along; only when the last one leaves a pull that is not detached
does the pull stop, and what arrived is kept for the next try.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from lmd.daemon.errors import Draining, QueueFull
from lmd.daemon.pull_job import PullJob, PullKey, PullStatus, State, Watcher, pull_key
from lmd.registry.errors import InvalidRequest, LmdError, PullCancelled
from lmd.registry.pull import PullEvent
from lmd.registry.ref import ModelRef, parse_ref
from lmd.registry.store import TagRecord

log = structlog.get_logger(__name__)

#: Each pull already uses several connections; more pulls at once only share the same link.
WORKERS = 8
#: Running and waiting ones together.
MAX_PULLS = 64
#: How long an ended pull is listed.
HISTORY_S = 3600.0
MAX_HISTORY = 256


class ModelPuller(Protocol):
    """Brings a model into the store, in the calling thread."""

    def pull(
        self,
        ref: ModelRef,
        *,
        token: str | None,
        on_event: Callable[[PullEvent], None],
        cancelled: threading.Event,
    ) -> TagRecord:
        """Return the tag of the pulled model; *on_event* may be called from several threads."""
        ...


class Pulls:
    """Starts, shares, lists and stops pulls. For use on one event loop.

    The transfers run in threads of their own, so that long pulls never keep the rest of the daemon waiting for one.
    """

    def __init__(
        self,
        puller: ModelPuller,
        *,
        workers: int = WORKERS,
        max_pulls: int = MAX_PULLS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._puller = puller
        self._workers = workers
        self._max_pulls = max_pulls
        self._clock = clock
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="pull")
        self._active: dict[PullKey, PullJob] = {}
        self._history: deque[tuple[float, PullStatus]] = deque(maxlen=MAX_HISTORY)
        self._stopping = False
        #: How many ended how.
        self.ended: Counter[State] = Counter()
        self._received_bytes = 0

    @property
    def running(self) -> int:
        """How many run or wait for a thread."""
        return len(self._active)

    @property
    def received_bytes(self) -> int:
        """What all pulls have received."""
        return self._received_bytes + sum(job.received_bytes for job in self._active.values())

    @asynccontextmanager
    async def attach(
        self, ref: ModelRef, *, text: str = "", token: str | None = None, detach: bool = False
    ) -> AsyncIterator[Watcher]:
        """Start the pull of *ref* or join it; leaving the block is leaving the pull.

        *token* is used by the pull it starts and by no other, and forgotten with it. *detach* lets the pull go on
        without watchers, also one that was started without.

        Raises:
            Draining: the daemon shuts down.
            QueueFull: too many pulls run and wait.
        """
        job, joined = await self._start_or_join(ref, text or ref.name, token, detach)
        watcher = Watcher(job, joined=joined)
        job.watchers.add(watcher)
        try:
            yield watcher
        finally:
            job.watchers.discard(watcher)
            if not job.watchers and not job.detached and not job.ended.is_set():
                log.info("pull_abandoned", pull_id=job.pull_id, name=job.ref.name)
                job.stop()

    async def _start_or_join(self, ref: ModelRef, text: str, token: str | None, detach: bool) -> tuple[PullJob, bool]:
        key = pull_key(ref)
        while True:
            if self._stopping:
                raise Draining
            job = self._active.get(key)
            if job is None:
                return self._start(ref, text, token, detach), False
            if not job.cancelled.is_set():
                job.detached = job.detached or detach
                log.info("pull_joined", pull_id=job.pull_id, name=ref.name)
                return job, True
            # It is on its way out; the next one resumes what it leaves.
            await job.ended.wait()

    def _start(self, ref: ModelRef, text: str, token: str | None, detach: bool) -> PullJob:
        if len(self._active) >= self._max_pulls:
            raise QueueFull(limit=self._max_pulls, retry_after_s=30.0)
        detail = "waiting for other pulls to end" if len(self._active) >= self._workers else ""
        job = PullJob(ref, text, detached=detach, detail=detail)
        loop = asyncio.get_running_loop()
        self._active[job.key] = job
        log.info("pull_started", pull_id=job.pull_id, name=ref.name, detached=detach)
        job.work = self._threads.submit(self._puller.pull, ref, token=token, on_event=job.note, cancelled=job.cancelled)
        job.work.add_done_callback(lambda work: loop.call_soon_threadsafe(self._end, job, work))
        return job

    def _end(self, job: PullJob, work: Future[TagRecord]) -> None:
        error = PullCancelled() if work.cancelled() else work.exception()
        if error is None:
            job.end(State.SUCCEEDED, work.result(), None)
        else:
            job.end(State.CANCELLED if isinstance(error, PullCancelled) else State.FAILED, None, error)
        del self._active[job.key]
        self.ended[job.state] += 1
        self._received_bytes += job.received_bytes
        self._history.append((self._clock(), job.status()))
        reason = error.reason if isinstance(error, LmdError) else ""
        if error is not None and not reason:
            log.error("pull_defect", pull_id=job.pull_id, name=job.ref.name, exc_info=error)
        log.info("pull_ended", pull_id=job.pull_id, name=job.ref.name, state=job.state.value, reason=reason)

    def statuses(self) -> list[PullStatus]:
        """Return the pulls under way and those that ended within the last hour, oldest first."""
        while self._history and self._clock() - self._history[0][0] > HISTORY_S:
            self._history.popleft()
        known = [status for _, status in self._history] + [job.status() for job in self._active.values()]
        return sorted(known, key=lambda status: status.started_at)

    async def cancel(self, pull_id_or_name: str) -> None:
        """Stop a pull for all its watchers and return when it has ended; what arrived is kept.

        A pull that was cancelled already is left as it is. Raises: InvalidRequest when there is no such pull.
        """
        wanted = pull_id_or_name.strip()
        jobs = [job for job in self._active.values() if job.pull_id == wanted] or self._named(wanted)
        if not jobs and not any(s.pull_id == wanted and s.state is State.CANCELLED for s in self.statuses()):
            raise InvalidRequest(
                f"no pull `{wanted[:200]}` is under way",
                field="pull_id",
                hint="name the model that is being pulled, or the pull's id",
            )
        for job in jobs:
            log.info("pull_cancelled", pull_id=job.pull_id, name=job.ref.name)
            job.stop()
        for job in jobs:
            await job.ended.wait()

    def _named(self, text: str) -> list[PullJob]:
        try:
            name = parse_ref(text).name.casefold()
        except LmdError:
            return []
        return [job for job in self._active.values() if job.ref.name.casefold() == name]

    async def stop(self) -> None:
        """Stop all pulls and return when their threads are done; new ones are refused from now on."""
        self._stopping = True
        jobs = list(self._active.values())
        for job in jobs:
            job.stop()
        for job in jobs:
            await job.ended.wait()
        self._threads.shutdown(wait=False)
