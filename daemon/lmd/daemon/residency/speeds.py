"""How fast answers come on this machine: what was measured, and what to expect of a model that never ran here.

To decode a token the engine reads the active weights once, so a model's speed is a device's bandwidth over its active
bytes. Answers that ran alone tell the bandwidth. It depends on the size of the model as well: small ones stay in caches
or spend their time on everything else; so it is kept by powers of two of the active bytes.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from lmd.daemon.residency.facts import FactStore, Pool
from lmd.daemon.residency.plans import Placement
from lmd.daemon.tasks import TaskSet
from lmd.registry.digest import Digest
from lmd.registry.errors import LmdError

log = structlog.get_logger(__name__)

_KIND = "speed"
#: Answers that are shorter say more about the clock than about the engine.
MIN_TOKENS = 16
MIN_DURATION_NS = 50_000_000
#: What is better by less is not worth a write.
BETTER = 1.05
#: What a model of at least this part of another's active bytes measured still says something about that one.
NEAR_BELOW = 16

#: The part of a device's rated bandwidth that decoding makes use of, as a rule of thumb until it was measured.
OF_RATED = 0.6


@dataclass(frozen=True, slots=True)
class Part:
    """What a token reads of one device."""

    device: str
    active_bytes: int


def parts_of(placement: Placement, active_bytes: int) -> list[Part]:
    """Return what a token reads of each device that a model is placed on: layers are taken to be alike."""
    layers = sum(share.layers for share in placement.shares)
    return [Part(share.device, active_bytes * share.layers // layers) for share in placement.shares if share.layers > 0]


def place_name(placement: Placement) -> str:
    """Return what a place is remembered by: its devices, and how the layers are divided."""
    parts = [share for share in placement.shares if share.layers > 0]
    if len(parts) == 1:
        return parts[0].device
    return "+".join(f"{share.device}:{share.layers}" for share in parts)


@dataclass(frozen=True, slots=True)
class Expected:
    """Tokens a second that one answer alone can expect, 0 for unknown; *calibrated* by runs on this machine."""

    tokens_per_second: float
    calibrated: bool


UNKNOWN = Expected(0.0, calibrated=False)


class Speeds:
    """Learns from answers, and remembers in the store. Use it from the event loop only.

    A store that cannot remember costs what was learned, and nothing else.
    """

    def __init__(self, store: FactStore, pool: Pool, rated: Callable[[str], Awaitable[int]]) -> None:
        """*rated* tells the bytes a second that a device is rated for, or 0."""
        self._store = store
        self._pool = pool
        self._rated = rated
        self._writes = TaskSet()
        # Lets one write end before the next begins, so that an older value never lands on a newer one.
        self._writing = asyncio.Lock()
        #: By device, the best bytes a second for each power of two of active bytes. None until it was read.
        self._bandwidths: dict[str, dict[int, float]] | None = None
        self._runs: dict[str, float] = {}

    def note_soon(
        self, digest: Digest, placement: Placement, active_bytes: int, *, tokens: int, duration_ns: int
    ) -> None:
        """Learn from an answer, as `note` does, without keeping anybody waiting."""
        if tokens < MIN_TOKENS or duration_ns < MIN_DURATION_NS:
            return
        parts = parts_of(placement, active_bytes)
        noting = self.note(digest, place_name(placement), parts, tokens=tokens, duration_ns=duration_ns)
        self._writes.start(noting, name="note-speed")

    async def note(
        self, digest: Digest, placement: str, parts: Sequence[Part], *, tokens: int, duration_ns: int
    ) -> None:
        """Learn from an answer: *tokens* after the first took *duration_ns*; nothing was drafted, and one choice made.

        Others may have run beside it: only what is better than before is kept. *placement* names where the model is.
        """
        if tokens < MIN_TOKENS or duration_ns < MIN_DURATION_NS:
            return
        per_second = tokens / (duration_ns / 1e9)
        run = self._run_key(digest, placement)
        if per_second > BETTER * await self._measured(run):
            self._runs[run] = per_second
            self._remember(run, lambda: f"{self._runs[run]:.6g}")
        if len(parts) != 1 or parts[0].active_bytes <= 0:
            # Of a model that is split nobody can tell how much each device took of the time.
            return
        part = parts[0]
        known = (await self._known()).setdefault(part.device, {})
        place = part.active_bytes.bit_length()
        bandwidth = per_second * part.active_bytes
        if bandwidth > BETTER * known.get(place, 0.0):
            known[place] = bandwidth
            self._remember(self._machine_key(), lambda: json.dumps(self._bandwidths))

    async def expect(self, digest: Digest | None, placement: str, parts: Sequence[Part]) -> Expected:
        """Return what to expect of a model: what it did here before, or what the bandwidths of its devices give."""
        if digest is not None and (measured := await self._measured(self._run_key(digest, placement))) > 0:
            return Expected(measured, calibrated=True)
        seconds, calibrated = 0.0, True
        for part in parts:
            bandwidth = await self._near(part)
            if bandwidth <= 0:
                calibrated = False
                bandwidth = OF_RATED * await self._rated(part.device)
            if bandwidth <= 0:
                return UNKNOWN
            seconds += part.active_bytes / bandwidth
        return Expected(1 / seconds, calibrated=calibrated) if seconds > 0 else UNKNOWN

    async def bandwidth(self, device: str) -> int:
        """Return the bytes a second that decoding has read from *device* at best; 0 when that was never measured."""
        return int(max((await self._known()).get(device, {}).values(), default=0.0))

    async def stop(self) -> None:
        """Return when all that was learned is written."""
        await self._writes.wait()

    async def _near(self, part: Part) -> float:
        """Return the bandwidth of models of this size: rather of larger ones, or else of ones not far below."""
        known = (await self._known()).get(part.device, {})
        place = part.active_bytes.bit_length()
        nearest = min(known, key=lambda other: (other < place, abs(other - place)), default=None)
        if nearest is None or nearest < place - NEAR_BELOW.bit_length() + 1:
            return 0.0
        return known[nearest]

    async def _measured(self, run: str) -> float:
        if run not in self._runs:
            text = await self._recall(run)
            self._runs[run] = _number(text)
        return self._runs[run]

    async def _known(self) -> dict[str, dict[int, float]]:
        if self._bandwidths is None:
            read = _bandwidths(await self._recall(self._machine_key()))
            # Another call may have read it meanwhile, and learned since.
            if self._bandwidths is None:
                self._bandwidths = read
        return self._bandwidths

    async def _recall(self, key: str) -> str | None:
        try:
            return await self._pool.run(self._store.recall, _KIND, key)
        except LmdError as error:
            log.warning("recall_failed", kind=_KIND, error=error.message)
            return None

    def _remember(self, key: str, value: Callable[[], str]) -> None:
        async def write() -> None:
            try:
                async with self._writing:
                    await self._pool.run(self._store.remember, _KIND, key, value())
            except LmdError as error:
                log.warning("remember_failed", kind=_KIND, error=error.message)

        self._writes.start(write(), name="remember-speed")

    def _machine_key(self) -> str:
        return f"bandwidths cpus={len(os.sched_getaffinity(0))}"

    def _run_key(self, digest: Digest, placement: str) -> str:
        return f"{digest} on={placement} cpus={len(os.sched_getaffinity(0))}"


def _number(text: str | None) -> float:
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if 0 < value < 1e9 else 0.0


def _bandwidths(text: str | None) -> dict[str, dict[int, float]]:
    """Read what was written; what another version wrote otherwise is as good as unknown."""
    try:
        read = json.loads(text or "{}")
        return {
            str(device): {int(place): float(value) for place, value in places.items() if 0 < float(value) < 1e15}
            for device, places in read.items()
        }
    except (ValueError, TypeError, AttributeError):
        log.warning("bandwidths_unreadable")
        return {}
