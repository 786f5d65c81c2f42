"""One pull and those who watch it."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum

from lmd.daemon.latest import Latest
from lmd.daemon.outcomes import note_failure
from lmd.registry.errors import LmdError
from lmd.registry.pull import PullEvent, PullState
from lmd.registry.ref import FileRef, ModelRef, UrlRef
from lmd.registry.store import TagRecord

#: Pulls with equal keys are the same pull.
PullKey = tuple[str, str, str]


def pull_key(ref: ModelRef) -> PullKey:
    """Return what makes two refs the same pull: the stored name, the asserted digest, and the URL or file behind it."""
    place = ref.url if isinstance(ref, UrlRef) else str(ref.path) if isinstance(ref, FileRef) else ""
    return (ref.name.casefold(), str(ref.digest or ""), place)


class State(Enum):
    """How far a pull is."""

    ACTIVE = "active"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class PullStatus:
    """A pull as it is listed; *started_at* is in seconds since the epoch."""

    pull_id: str
    ref: str
    name: str
    state: State
    completed_bytes: int
    total_bytes: int
    started_at: float
    detached: bool
    watchers: int
    error_message: str


class PullJob:
    """A pull under way. Everything but *cancelled* and `latest.put` belongs to the loop's thread."""

    def __init__(self, ref: ModelRef, text: str, *, detached: bool, detail: str) -> None:
        self.pull_id = secrets.token_hex(6)
        self.ref = ref
        # A URL's query often is a signature, and this text is shown to every caller.
        self.text = ref.name if isinstance(ref, UrlRef) else text
        self.key = pull_key(ref)
        self.detached = detached
        self.started_at = time.time()
        self.cancelled = threading.Event()
        self.ended = asyncio.Event()
        self.watchers: set[Watcher] = set()
        self.events: dict[str, PullEvent] = {"": _resolving(detail)}
        #: What arrived by this pull; never falls, also when a transfer begins anew.
        self.received_bytes = 0
        self.state = State.ACTIVE
        self.record: TagRecord | None = None
        self.error: BaseException | None = None
        self.work: Future[TagRecord] | None = None
        self.latest: Latest[PullEvent] = Latest(self._deliver, urgent=_changes_state)

    def note(self, event: PullEvent) -> None:
        """Take in an event of the transfer. Callable from any thread."""
        self.latest.put(event.filename, event)

    def stop(self) -> None:
        """Ask the transfer to end; one that waits for a thread ends here."""
        self.cancelled.set()
        if self.work is not None:
            self.work.cancel()

    def end(self, state: State, record: TagRecord | None, error: BaseException | None) -> None:
        """Hand the outcome to the watchers, after everything that was noted before."""
        self.latest.flush()
        self.state, self.record, self.error = state, record, error
        self.ended.set()
        for watcher in self.watchers:
            watcher.notice(None)

    def status(self) -> PullStatus:
        """Return the pull as it is now."""
        return PullStatus(
            pull_id=self.pull_id,
            ref=self.text,
            name=self.ref.name,
            state=self.state,
            completed_bytes=sum(event.completed_bytes for event in self.events.values()),
            total_bytes=sum(event.total_bytes for event in self.events.values()),
            started_at=self.started_at,
            detached=self.detached,
            watchers=0 if self.ended.is_set() else len(self.watchers),
            error_message=self._error_message(),
        )

    def _error_message(self) -> str:
        if self.state is not State.FAILED:
            return ""
        return self.error.message if isinstance(self.error, LmdError) else "a defect of the daemon; see its log"

    def _deliver(self, key: str, event: PullEvent) -> None:
        if key:
            # Once there are files, what was said about the whole is history.
            self.events.pop("", None)
        if event.state is not PullState.PRESENT:
            before = self.events.get(key)
            known_bytes = before.completed_bytes if before is not None else event.resumed_bytes
            self.received_bytes += max(0, event.completed_bytes - known_bytes)
        self.events[key] = event
        for watcher in self.watchers:
            watcher.notice(key)


class Watcher:
    """One caller's view of a pull: iterate the events, then ask for the result.

    Events are absolute and coalesced: a watcher that is slow sees fewer of them, costs no memory and never holds up
    the pull. A watcher that joins late sees the latest event of every file first.
    """

    def __init__(self, job: PullJob, *, joined: bool) -> None:
        self.pull_id = job.pull_id
        self.name = job.ref.name
        self.joined = joined
        self._job = job
        self._unseen: dict[str, None] = dict.fromkeys(job.events)
        self._wake = asyncio.Event()

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> PullEvent:
        while True:
            while self._unseen:
                key = next(iter(self._unseen))
                del self._unseen[key]
                if key in self._job.events:
                    return self._job.events[key]
            if self._job.ended.is_set():
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()

    def result(self) -> TagRecord:
        """Return the model of a pull whose events have all been seen.

        Raises: whatever ended the pull, PullCancelled included.
        """
        if self._job.error is not None:
            # Some watchers tell it inside of a stream, where no door sees it.
            note_failure(self._job.error)
            raise self._job.error.with_traceback(None)
        assert self._job.record is not None, "result() before the last event"
        return self._job.record

    def notice(self, key: str | None) -> None:
        """Take note of a new event of *key*, or of the pull's end."""
        if key is not None:
            self._unseen[key] = None
        self._wake.set()


def _changes_state(before: PullEvent, after: PullEvent) -> bool:
    return before.state is not after.state or before.detail != after.detail


def _resolving(detail: str) -> PullEvent:
    return PullEvent(
        digest="",
        filename="",
        completed_bytes=0,
        total_bytes=0,
        state=PullState.RESOLVING,
        resumed_bytes=0,
        detail=detail,
    )
