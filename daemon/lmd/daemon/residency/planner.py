"""Decides where a model goes and who has to leave for it.

Pure: no clock, no processes, no I/O. Whoever asks brings a picture of the machine and carries out the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of one device, as it was read."""

    id: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that holds memory of a device.

    Attributes:
        key: names it in plans.
        device: where it is.
        held_bytes: what comes free when it leaves.
        unseen_bytes: of those, what a reading of the device still shows as free: all while it loads; later the
            memory-mapped weights, which the kernel counts as cache.
        busy: whether it serves, or loads for someone.
        last_used: any number that grows with time.
        pinned: whether it may not be evicted.
        leaving: whether it is on its way out already.
    """

    key: str
    device: str
    held_bytes: int
    unseen_bytes: int = 0
    busy: bool = False
    last_used: float = 0.0
    pinned: bool = False
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """It fits now, on *device*."""

    device: str


@dataclass(frozen=True, slots=True)
class Evict:
    """It fits on *device* once *victims*, all idle, and those that leave already are gone."""

    device: str
    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """It fits on *device* once *holders* are idle or gone; ask again when something changes."""

    device: str
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """It does not fit, whoever leaves; *device* comes closest, with *free_bytes* at best."""

    device: str
    needed_bytes: int
    free_bytes: int


Plan = Load | Evict | Wait | Refuse


def plan(
    devices: Sequence[DeviceMemory], residents: Sequence[Resident], *, needed_bytes: int, reserve_bytes: int
) -> Plan:
    """Return the gentlest way to place *needed_bytes* on one of *devices*, which are equally good.

    Loading beats evicting, evicting beats waiting, waiting beats refusing. Busy and pinned residents are never
    victims. Victims are the least recently used that suffice, and none of them is redundant. Of several devices that
    allow the same, the one with the most room is taken, or the one where the fewest bytes are evicted.
    """
    if not devices:
        raise ValueError("no devices")
    by_rank = {Load: 0, Evict: 1, Wait: 2, Refuse: 3}
    outcomes = []
    for device in devices:
        here = [resident for resident in residents if resident.device == device.id]
        free_bytes = device.free_bytes - reserve_bytes - sum(resident.unseen_bytes for resident in here)
        outcome, cost = _plan_one(device.id, here, free_bytes, needed_bytes)
        outcomes.append((by_rank[type(outcome)], cost, outcome))
    return min(outcomes, key=lambda ranked: ranked[:2])[2]


def _plan_one(device: str, here: Sequence[Resident], free_bytes: int, needed_bytes: int) -> tuple[Plan, int]:
    """Return the plan for one device and its cost among plans of the same kind."""
    if free_bytes >= needed_bytes:
        return Load(device), -free_bytes
    leaving = [resident for resident in here if resident.leaving]
    gap_bytes = needed_bytes - free_bytes - _held(leaving)
    if gap_bytes <= 0:
        return Wait(device, _keys(leaving)), gap_bytes
    idle = [r for r in here if not (r.busy or r.pinned or r.leaving)]
    if _held(idle) >= gap_bytes:
        victims = _victims(idle, gap_bytes)
        return Evict(device, _keys(victims)), _held(victims)
    busy = [r for r in here if r.busy and not (r.pinned or r.leaving)]
    gap_bytes -= _held(idle) + _held(busy)
    if gap_bytes <= 0:
        return Wait(device, _keys(busy)), gap_bytes
    return Refuse(device, needed_bytes, max(0, needed_bytes - gap_bytes)), gap_bytes


def _victims(idle: Sequence[Resident], gap_bytes: int) -> list[Resident]:
    """Take the least recently used until they suffice; then spare who is not needed after all, latest used first."""
    chosen: list[Resident] = []
    for resident in sorted(idle, key=lambda r: (r.last_used, r.key)):
        if _held(chosen) >= gap_bytes:
            break
        chosen.append(resident)
    for resident in reversed(chosen):
        if _held(chosen) - resident.held_bytes >= gap_bytes:
            chosen = [other for other in chosen if other is not resident]
    return chosen


def _held(residents: Sequence[Resident]) -> int:
    return sum(resident.held_bytes for resident in residents)


def _keys(residents: Sequence[Resident]) -> tuple[str, ...]:
    return tuple(resident.key for resident in residents)
