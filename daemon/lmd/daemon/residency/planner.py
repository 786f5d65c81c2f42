"""Decides where a model goes and who has to leave for it.

Pure: no clock, no processes, no I/O. Whoever asks brings a picture of the machine and carries out the answer.

The ways to place a model, in order of preference:

1. Whole, on one accelerator or split across several of one backend: where it fits now; else where it fits once those
   that leave already are gone; else where idle models leave for it; else where busy ones have to finish first.
2. The same with the next smaller context that will do, when the larger one is out of reach whoever leaves.
3. In part on accelerators, when they take enough of it (`placement.WORTH`). Idle models leave when that brings a tenth
   of the layers more. Nobody waits for busy ones for the sake of a part.
4. In main memory, by the same steps as 1, with the largest context that will do.

An ask for a number of layers (`num_gpu`) has one way: that number. Who leaves is in `victims`, how long busy models
may keep what they have in `turns`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lmd.daemon.residency import reasons
from lmd.daemon.residency.placement import fits, in_main_memory, most_layers, on_one, on_several
from lmd.daemon.residency.plans import (
    CPU,
    Action,
    Ask,
    DeviceMemory,
    Held,
    Level,
    Need,
    Placement,
    Plan,
    Resident,
    Room,
    Share,
)
from lmd.daemon.residency.turns import must_yield, stays
from lmd.daemon.residency.victims import cheapest, cost, turn_cost

#: Idle models leave for a larger part of a model on accelerators when it has so much of the layers more.
WORTH_EVICTING = 0.1


def plan(devices: Sequence[DeviceMemory], residents: Sequence[Resident], ask: Ask, *, reserve_bytes: int) -> Plan:
    """Return the gentlest way to give *ask* what it needs; *reserve_bytes* of each device stay free.

    Loading beats evicting, evicting beats waiting, waiting beats refusing. Busy and pinned residents are never
    victims, and nothing is evicted for a load that has to wait all the same.

    Raises:
        ValueError: none of the devices may be used.
    """
    return _Machine(devices, residents, ask, reserve_bytes).decide()


class _Machine:
    """One ask, and what the machine has for it."""

    def __init__(
        self, devices: Sequence[DeviceMemory], residents: Sequence[Resident], ask: Ask, reserve_bytes: int
    ) -> None:
        self.ask = ask
        self.residents = residents
        here: dict[str, list[tuple[Resident, Held, bool]]] = defaultdict(list)
        for resident in residents:
            evictable = _is_evictable(ask, resident)
            for held in resident.held:
                here[held.device].append((resident, held, evictable))
        self.rooms = {device.id: Room.of(device.free_bytes - reserve_bytes, here[device.id]) for device in devices}
        allowed = [device for device in devices if ask.devices is None or device.id in ask.devices]
        self.backends: dict[str, list[str]] = defaultdict(list)
        for device in allowed:
            if device.id != CPU and ask.num_gpu != 0:
                self.backends[device.backend].append(device.id)
        on_cpu = any(device.id == CPU for device in allowed)
        self.uses_cpu = on_cpu and (ask.num_gpu <= 0 or not self.backends)
        if not self.backends and not self.uses_cpu:
            raise ValueError("none of the devices may be used")

    def decide(self) -> Plan:
        """Go through the ways in order of preference."""
        for found in self._ways():
            if found is not None:
                return replace(found, reason=reasons.of(found, self.ask, self.residents, self.rooms))
        refused = self._refusal()
        return replace(refused, reason=reasons.of(refused, self.ask, self.residents, self.rooms))

    def _ways(self) -> Iterator[Plan | None]:
        ask = self.ask
        if self.backends:
            for need in ask.needs:
                yield self._on_accelerators(need)
            if ask.num_gpu == -1 and self.uses_cpu:
                for need in ask.needs:
                    yield self._in_part(need)
        if self.uses_cpu:
            for need in ask.needs:
                yield self._gentlest([in_main_memory(need)])

    def _on_accelerators(self, need: Need) -> Plan | None:
        """Place the wanted layers, as a rule all, at the gentlest level."""
        wanted = need.layer_count if self.ask.num_gpu == -1 else min(self.ask.num_gpu, need.layer_count)
        whole = [on_one(need, device, wanted) for devices in self.backends.values() for device in devices]
        for level in Level:
            room = self._room(level)
            fitting = [placement for placement in whole if fits(placement, room)]
            if not fitting:
                fitting = [
                    placement
                    for devices in self.backends.values()
                    if len(devices) > 1
                    and (placement := on_several(need, {device: room[device] for device in devices}, wanted))
                    and fits(placement, room)
                ]
            if fitting:
                return self._best(fitting, level)
        return None

    def _in_part(self, need: Need) -> Plan | None:
        """Place as many layers as are worth it, without waiting for busy models."""
        now, idle = (self._most(need, level) for level in (Level.NOW, Level.IDLE))
        if idle is None:
            return None
        if now is not None and idle.gpu_layers - now.gpu_layers <= WORTH_EVICTING * need.layer_count:
            return self._best([now], Level.NOW)
        return self._gentlest([idle])

    def _most(self, need: Need, level: Level) -> Placement | None:
        room = self._room(level)
        found = [
            placement
            for devices in self.backends.values()
            if (placement := most_layers(need, {device: room[device] for device in devices})) and fits(placement, room)
        ]
        return max(found, key=lambda placement: placement.gpu_layers, default=None)

    def _gentlest(self, placements: Sequence[Placement]) -> Plan | None:
        for level in Level:
            room = self._room(level)
            if fitting := [placement for placement in placements if fits(placement, room)]:
                return self._best(fitting, level)
        return None

    def _best(self, placements: Sequence[Placement], level: Level) -> Plan:
        """Of placements that a level allows, take the roomiest, or the one where leaving costs least."""
        plans = [(self._plan(placement, level), placement) for placement in placements]

        def rank(entry: tuple[Plan, Placement]) -> tuple[bool, float, int]:
            made, placement = entry
            victims = [resident for resident in self.residents if resident.key in made.others]
            evicting_s = sum(map(cost, victims)) if made.action is Action.EVICT else 0.0
            return made.action is Action.WAIT, evicting_s, -self.rooms[placement.device].after(level)

        return min(plans, key=rank)[0]

    def _plan(self, placement: Placement, level: Level) -> Plan:
        needed_bytes = placement.total_bytes
        if level is Level.NOW:
            return Plan(Action.LOAD, placement, needed_bytes=needed_bytes)
        leaving = tuple(r.key for r in self._on(placement) if r.leaving)
        if level is Level.LEAVING:
            return Plan(Action.WAIT, placement, leaving, holds_place=True, needed_bytes=needed_bytes)
        gaps = self._gaps(placement, Level.LEAVING)
        if level is Level.IDLE:
            idle = [r for r in self._on(placement) if _is_evictable(self.ask, r)]
            victims = cheapest(idle, gaps) or []
            others = tuple(r.key for r in victims)
            return Plan(Action.EVICT, placement, others, holds_place=True, needed_bytes=needed_bytes)
        yielding = [r for r in self._on(placement) if must_yield(self.ask, r)]
        turn = cheapest(yielding, self._gaps(placement, Level.IDLE), turn_cost)
        if turn:
            others = tuple(r.key for r in turn)
            return Plan(Action.TURN, placement, others, holds_place=True, needed_bytes=needed_bytes)
        kept = [r for r in self._on(placement) if not (r.pinned or r.leaving or _is_evictable(self.ask, r))]
        return Plan(Action.WAIT, placement, tuple(r.key for r in kept), needed_bytes=needed_bytes)

    def _refusal(self) -> Plan:
        """Say what comes closest to fitting: the smallest context, in the last way that there is."""
        need = self.ask.needs[-1]
        if self.uses_cpu:
            placements = [in_main_memory(need)]
        else:
            wanted = need.layer_count if self.ask.num_gpu == -1 else min(self.ask.num_gpu, need.layer_count)
            placements = [on_one(need, device, wanted) for devices in self.backends.values() for device in devices]
        room = self._room(Level.BUSY)

        def missing(share: Share) -> int:
            return share.bytes - room.get(share.device, 0)

        worst = [(max(placement.shares, key=missing), placement) for placement in placements]
        share, placement = min(worst, key=lambda entry: missing(entry[0]))
        return Plan(
            Action.REFUSE,
            placement,
            device=share.device,
            needed_bytes=share.bytes,
            free_bytes=max(0, room.get(share.device, 0)),
        )

    def _room(self, level: Level) -> dict[str, int]:
        return {device: room.after(level) for device, room in self.rooms.items()}

    def _gaps(self, placement: Placement, level: Level) -> Mapping[str, int]:
        return {share.device: share.bytes - self.rooms[share.device].after(level) for share in placement.shares}

    def _on(self, placement: Placement) -> list[Resident]:
        """Return who holds memory that the placement lacks."""
        short = {device for device, bytes_ in self._gaps(placement, Level.NOW).items() if bytes_ > 0}
        return [r for r in self.residents if any(part.device in short and part.held_bytes for part in r.held)]


def _is_evictable(ask: Ask, resident: Resident) -> bool:
    return not (resident.busy or resident.pinned or resident.leaving or stays(ask, resident))
