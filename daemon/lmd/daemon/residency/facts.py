"""Small measured facts about models, kept in the store so that the next load need not guess."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ParamSpec, Protocol, TypeVar

import structlog

from lmd.daemon.residency.values import LoadSettings
from lmd.registry.digest import Digest
from lmd.registry.errors import LmdError

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class FactStore(Protocol):
    """The part of the store that remembers; blocking."""

    def recall(self, kind: str, key: str) -> str | None:
        """Return what was remembered last."""

    def remember(self, kind: str, key: str, value: str) -> None:
        """Keep *value* until it is replaced."""


class Pool(Protocol):
    """Runs blocking calls in threads."""

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *fn* and return its result."""


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """What a runner reported after a load, in bytes."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    vram_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it, on all devices."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


class Facts:
    """Remembers memory by manifest and settings, and threads by manifest and machine.

    A store that cannot remember makes the next load guess again; it does not fail this one.
    """

    def __init__(self, store: FactStore, pool: Pool, slots: int) -> None:
        self._store = store
        self._pool = pool
        self._slots = slots

    async def memory(self, digest: Digest, settings: LoadSettings, device: str) -> MeasuredMemory | None:
        """Return what these settings took on *device* ("cpu" or "gpu") the last time."""
        text = await self._recall("memory", self._memory_key(digest, settings, device))
        try:
            return MeasuredMemory(**json.loads(text)) if text is not None else None
        except (ValueError, TypeError):
            # Written by another version: as good as unknown, and replaced after this load.
            log.warning("measured_memory_unreadable", digest=str(digest))
            return None

    async def note_memory(self, digest: Digest, settings: LoadSettings, device: str, measured: MeasuredMemory) -> None:
        """Keep what a load took."""
        value = json.dumps(asdict(measured), sort_keys=True)
        await self._remember("memory", self._memory_key(digest, settings, device), value)

    async def threads(self, digest: Digest, engine: str) -> tuple[int, int]:
        """Return the fastest thread counts, for answers and for prompts; zeros when they were never measured here."""
        text = await self._recall("threads", self._threads_key(digest, engine))
        counts = (text or "").split()
        if len(counts) != 2 or not all(count.isdecimal() and len(count) < 5 for count in counts):
            return 0, 0
        return int(counts[0]), int(counts[1])

    async def note_threads(self, digest: Digest, engine: str, num_thread: int, num_thread_batch: int) -> None:
        """Keep measured thread counts."""
        await self._remember("threads", self._threads_key(digest, engine), f"{num_thread} {num_thread_batch}")

    async def _recall(self, kind: str, key: str) -> str | None:
        try:
            return await self._pool.run(self._store.recall, kind, key)
        except LmdError as error:
            log.warning("recall_failed", kind=kind, error=error.message)
            return None

    async def _remember(self, kind: str, key: str, value: str) -> None:
        try:
            await self._pool.run(self._store.remember, kind, key, value)
        except LmdError as error:
            log.warning("remember_failed", kind=kind, error=error.message)

    def _memory_key(self, digest: Digest, settings: LoadSettings, device: str) -> str:
        return (
            f"{digest} ctx={settings.num_ctx} slots={self._slots} batch={settings.num_batch} "
            f"kv={settings.kv_type} gpu={settings.num_gpu} mmap={int(settings.use_mmap)} device={device}"
        )

    def _threads_key(self, digest: Digest, engine: str) -> str:
        return f"{digest} cpus={len(os.sched_getaffinity(0))} engine={engine}"
