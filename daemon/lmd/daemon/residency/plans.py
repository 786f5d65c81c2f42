"""What the planner is asked, what it knows of the machine, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from lmd.registry.memory import MemoryEstimate

#: The id of the machine's own memory; all other devices are accelerators.
CPU = "cpu"


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of one device, as it was read."""

    id: str
    total_bytes: int
    free_bytes: int

    @property
    def backend(self) -> str:
        """What the engine reaches it through: a model is split across devices of one backend only."""
        return self.id.rstrip("0123456789")


@dataclass(frozen=True, slots=True)
class Held:
    """What a resident holds of one device.

    Attributes:
        device: its id.
        held_bytes: what comes free when the resident leaves.
        unseen_bytes: of those, what a reading of the device still shows as free: all while it loads; later the
            memory-mapped weights, which the kernel counts as cache.
    """

    device: str
    held_bytes: int
    unseen_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Resident:
    """A model, or a lease, that holds memory.

    Attributes:
        key: names it in plans.
        held: what it holds of each device.
        name: names it for people.
        busy: whether it serves, or loads for someone.
        pinned: whether it may not be evicted.
        leaving: whether it is on its way out already.
        idle_s: how long nobody has used it.
        stay_s: how much longer it is worth keeping, because several clients use it.
        again_s: how much longer it may be asked again soon, as it was each time so far.
        resident_s: how long it has been loaded; 0 while it loads.
        reload_s: how long its last load took; 0 when that is not known.
        answer_s: how long its answers take; 0 when that is not known.
        priority: the lower goes first.
    """

    key: str
    held: tuple[Held, ...]
    name: str = ""
    busy: bool = False
    pinned: bool = False
    leaving: bool = False
    idle_s: float = 0.0
    stay_s: float = 0.0
    again_s: float = 0.0
    resident_s: float = 0.0
    reload_s: float = 0.0
    answer_s: float = 0.0
    priority: int = 0

    @property
    def held_bytes(self) -> int:
        """All of it, on all devices."""
        return sum(part.held_bytes for part in self.held)

    @property
    def label(self) -> str:
        """How reasons call it."""
        return f"`{self.name or self.key}`"


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes with a context of *num_ctx* tokens, by what can be placed apart.

    Attributes:
        num_ctx: tokens of context for each request.
        layers: bytes of each repeating layer in order, its keys and values included.
        output_bytes: the layer that `num_gpu` counts beside them, and the first to be placed.
        input_bytes: what stays in main memory.
        compute_bytes: scratch memory, on each device that computes.
        beside_bytes: the draft and the adapters; they go to the first accelerator.
        parked_bytes: main memory that prefixes may take.
        cpu_bytes: what it takes when all of it is in main memory.
        gpu_bytes: what one accelerator holds when all layers are there.
        host_bytes: what main memory holds then.
    """

    num_ctx: int
    layers: tuple[int, ...]
    output_bytes: int
    input_bytes: int
    compute_bytes: int
    beside_bytes: int
    parked_bytes: int
    cpu_bytes: int
    gpu_bytes: int
    host_bytes: int

    @property
    def layer_count(self) -> int:
        """Layers as `num_gpu` counts them: the output is one more."""
        return len(self.layers) + 1

    @classmethod
    def of(cls, num_ctx: int, estimate: MemoryEstimate, *, beside_bytes: int = 0, parked_bytes: int = 0) -> Need:
        """Return what an estimate comes to."""
        layers = tuple(layer.total_bytes for layer in estimate.layers)
        placed_bytes = sum(layers) + estimate.output_bytes + estimate.compute_bytes
        return cls(
            num_ctx=num_ctx,
            layers=layers,
            output_bytes=estimate.output_bytes,
            input_bytes=estimate.input_bytes,
            compute_bytes=estimate.compute_bytes,
            beside_bytes=beside_bytes,
            parked_bytes=parked_bytes,
            cpu_bytes=estimate.total_bytes + beside_bytes + parked_bytes,
            gpu_bytes=placed_bytes + beside_bytes,
            host_bytes=estimate.input_bytes + parked_bytes,
        )

    @classmethod
    def flat(cls, needed_bytes: int, *, num_ctx: int = 0, host_bytes: int = 0) -> Need:
        """Return a need that cannot be divided; *host_bytes* of main memory come on top when it is elsewhere."""
        return cls(num_ctx, (), 0, 0, 0, 0, 0, needed_bytes, needed_bytes, host_bytes)


@dataclass(frozen=True, slots=True)
class Ask:
    """What wants memory.

    Attributes:
        key: names it in plans.
        name: names it for people.
        needs: what it takes, in order of preference: the context that is wanted, then smaller ones that will do.
        num_gpu: layers on accelerators; -1 for as many as are worth it.
        devices: where it may go; None for everywhere.
        priority: the higher is served first, and does not yield to the lower.
        waited_s: how long it has waited.
    """

    key: str
    name: str
    needs: tuple[Need, ...]
    num_gpu: int = -1
    devices: tuple[str, ...] | None = None
    priority: int = 0
    waited_s: float = 0.0

    @classmethod
    def of_bytes(cls, key: str, name: str, needed_bytes: int, device: str, *, priority: int = 0) -> Ask:
        """Return the ask for plain memory of one device, as a lease makes it."""
        return cls(key, name, (Need.flat(needed_bytes),), devices=(device,), priority=priority)


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a model: so many bytes of a device, with so many layers."""

    device: str
    bytes: int
    layers: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes, and with which context. *shares*: accelerators first, main memory last."""

    num_ctx: int
    shares: tuple[Share, ...]

    @property
    def accelerators(self) -> tuple[Share, ...]:
        """The parts on accelerators."""
        return tuple(share for share in self.shares if share.device != CPU)

    @property
    def gpu_layers(self) -> int:
        """Layers on accelerators."""
        return sum(share.layers for share in self.accelerators)

    @property
    def is_whole(self) -> bool:
        """Whether all layers are on accelerators."""
        return bool(self.accelerators) and not any(share.layers for share in self.shares if share.device == CPU)

    @property
    def device(self) -> str:
        """The first device: the one it goes to, unless it is split."""
        return self.shares[0].device

    @property
    def total_bytes(self) -> int:
        """Everything, on all devices."""
        return sum(share.bytes for share in self.shares)


class Action(Enum):
    """What is done for an ask; see `Decision.Action` of the API."""

    LOAD = "load"
    EVICT = "evict"
    WAIT = "wait"
    TURN = "turn"
    REFUSE = "refuse"
    #: What the planner calls LOAD is this for a lease.
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision.

    Attributes:
        action: LOAD: it fits now. EVICT: it fits once *others*, all idle, are gone. WAIT: it fits once *others* are
            idle or gone. TURN: *others*, busy, finish their answers and leave. REFUSE: it does not fit, whoever leaves.
        placement: where it goes; of what is refused, where it comes closest to.
        others: keys.
        reason: why, in words and numbers.
        holds_place: whether nobody else may take the memory that comes free for it.
        device: of what is refused, the device that is too small.
        needed_bytes: what it takes there; of other plans, on all devices.
        free_bytes: of what is refused, what can be had there at best.
    """

    action: Action
    placement: Placement
    others: tuple[str, ...] = ()
    reason: str = ""
    holds_place: bool = False
    device: str = ""
    needed_bytes: int = 0
    free_bytes: int = 0


class Level(Enum):
    """What has to happen before memory can be had."""

    NOW = 0
    LEAVING = 1
    IDLE = 2
    BUSY = 3


@dataclass(slots=True)
class Room:
    """The bytes of one device that an ask can have: now, and when others leave."""

    now: int
    leaving: int = 0
    idle: int = 0
    busy: int = 0

    @classmethod
    def of(cls, free_bytes: int, residents: Iterable[tuple[Resident, Held, bool]]) -> Room:
        """Add up what *residents* hold of a device with *free_bytes*; with each, whether the ask may evict it."""
        room = cls(free_bytes)
        for resident, held, evictable in residents:
            room.now -= held.unseen_bytes
            if resident.leaving:
                room.leaving += held.held_bytes
            elif evictable:
                room.idle += held.held_bytes
            elif not resident.pinned:
                room.busy += held.held_bytes
        return room

    def after(self, level: Level) -> int:
        """Return what there is at a level."""
        if level is Level.NOW:
            return self.now
        if level is Level.LEAVING:
            return self.now + self.leaving
        if level is Level.IDLE:
            return self.now + self.leaving + self.idle
        return self.now + self.leaving + self.idle + self.busy
