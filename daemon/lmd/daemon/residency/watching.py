"""Tells those who watch what happens to runners, as it happens."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from lmd.daemon.residency.values import RunnerState, RunnerStatus
from lmd.registry.digest import Digest

#: A watcher sees changes at most so often; those in between come together.
INTERVAL_S = 0.1
#: What follows from a change within so short a time comes with it: a load that finds a runner ready starts at once.
GATHER_S = 0.02
#: What nobody announces, such as a slot that becomes busy inside of a runner, is looked at so often.
LOOK_S = 1.0
#: A watcher that does not read loses the oldest events, not the daemon's memory.
MAX_EVENTS = 1000


@dataclass(frozen=True, slots=True)
class RunnerChange:
    """A change of one runner; *state* is None when it is gone."""

    name: str
    digest: Digest
    state: RunnerState | None
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class RunnersSeen:
    """All runners after *changes*; the first picture of a watcher has none."""

    runners: tuple[RunnerStatus, ...]
    changes: tuple[RunnerChange, ...]


@dataclass(slots=True, eq=False)
class _Watcher:
    changes: deque[RunnerChange] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class Watchers:
    """Those who watch. Nothing is kept, and nothing costs anything, while there is nobody."""

    def __init__(self, look: Callable[[], list[RunnerStatus]], over: Callable[[], bool]) -> None:
        """*look* returns the runners; *over* says that there is nothing left to see."""
        self._look = look
        self._over = over
        self._watchers: set[_Watcher] = set()

    def note(self, name: str, digest: Digest, state: RunnerState | None, reason: str) -> None:
        """Tell a change of state, or of its reason."""
        if not self._watchers:
            return
        change = RunnerChange(name, digest, state, reason, datetime.now(UTC))
        for watcher in self._watchers:
            watcher.changes.append(change)
            watcher.woken.set()

    def note_traffic(self) -> None:
        """Tell that requests came or went."""
        for watcher in self._watchers:
            watcher.woken.set()

    async def watch(self) -> AsyncGenerator[RunnersSeen, None]:
        """Yield a picture at once, and another after each change, until it is over."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            shown = self._look()
            yield RunnersSeen(tuple(shown), ())
            while not self._over():
                await _woken(watcher.woken)
                await asyncio.sleep(GATHER_S)
                watcher.woken.clear()
                runners, changes = self._look(), tuple(watcher.changes)
                watcher.changes.clear()
                if changes or not _same(runners, shown):
                    shown = runners
                    yield RunnersSeen(tuple(runners), changes)
                await asyncio.sleep(INTERVAL_S)
        finally:
            self._watchers.discard(watcher)


async def _woken(event: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(LOOK_S):
            await event.wait()
    except TimeoutError:
        return


def _same(runners: list[RunnerStatus], before: list[RunnerStatus]) -> bool:
    """Compare what is listed; when a model leaves is computed anew each time, so it differs by a hair."""
    return len(runners) == len(before) and all(map(_looks_like, runners, before))


def _looks_like(status: RunnerStatus, before: RunnerStatus) -> bool:
    leaves, left = status.expires_at, before.expires_at
    if leaves is not None and left is not None and abs(leaves - left) < timedelta(seconds=1):
        left = leaves
    return status == replace(before, expires_at=left)
