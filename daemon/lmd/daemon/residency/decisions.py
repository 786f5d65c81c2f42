"""What the ledger is told, and what it tells: how a resident is used, what was decided, the machine at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from lmd.daemon.residency.planner import plan
from lmd.daemon.residency.plans import Ask, DeviceMemory, Plan, Resident
from lmd.registry.errors import LmdError

#: How the keys of leases begin; those of models are digests.
LEASE_PREFIX = "lease "


@dataclass(frozen=True, slots=True)
class Usage:
    """What a resident does now, as far as eviction cares.

    Attributes:
        busy: whether it serves, or loads for someone.
        last_used: when it was used last, on the loop's clock.
        pinned: whether it may not be evicted.
        leaving: whether it is on its way out already, with nobody left to finish.
        grown_bytes: what it has taken since it was loaded, of what it may take: the machine's figures show them.
        queued: requests that wait for it.
        reload_s: how long its last load took; 0 when that is not known.
        loaded_at: when it became ready, on the loop's clock; 0 while it is not.
        priority: who may take memory from whom: the lower goes first.
        pause_s: how soon it is usually asked again when it was idle; 0 when that never happened since it was loaded.
        answer_s: how long its answers take; 0 when that is not known.
        shared: whether it has had two requests at once since it was loaded.
        by_name: whether it is pinned because somebody has pinned it, and not by a keep-alive without end.
    """

    busy: bool
    last_used: float
    pinned: bool
    leaving: bool
    grown_bytes: int = 0
    queued: int = 0
    reload_s: float = 0.0
    loaded_at: float = 0.0
    priority: int = 0
    pause_s: float = 0.0
    answer_s: float = 0.0
    shared: bool = False
    by_name: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for an ask: the plan, for whom, when, after which wait, and the names of the others in it."""

    name: str
    plan: Plan
    others: tuple[str, ...]
    waited_s: float
    time: datetime


@dataclass(frozen=True, slots=True)
class Picture:
    """The machine at one moment, for asking what would be decided."""

    devices: tuple[DeviceMemory, ...]
    residents: tuple[Resident, ...]
    reserve_bytes: int

    def plan(self, ask: Ask) -> Plan:
        """Return what would be decided for *ask*; nothing changes."""
        return plan(self.devices, self.residents, ask, reserve_bytes=self.reserve_bytes)

    def names(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Return the names of residents, for people."""
        named = {resident.key: resident.name or resident.key for resident in self.residents}
        return tuple(named.get(key, key) for key in keys)


@dataclass(frozen=True, slots=True)
class Refusal:
    """That there is no place for an ask, whoever leaves; *settling*: by a reading that may be wrong for a moment."""

    error: LmdError
    settling: bool = False
    reason: str = ""
