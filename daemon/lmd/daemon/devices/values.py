"""What the daemon knows of devices, from three sources: the kernel, the drivers, and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

#: The id of the machine's own memory; all other devices are accelerators.
CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Device:
    """Something with memory that models are loaded on, or could be.

    Attributes:
        id: "cpu"; the engine's word and number, such as "cuda0"; for what the engine does not find, the vendor's name
            and the driver's number, such as "nvidia0".
        description: what it is, for people.
        total_bytes: what all of us may use: for "cpu" the smaller of the machine's memory and the cgroup's limit.
        free_bytes: of that, what is free or can be freed at once (page cache).
        backend: the engine's way to it: "cpu", "cuda", "rocm", "sycl", "vulkan", "metal"; "" when there is none.
        usable: whether models can be loaded on it now.
        reason: why it is not usable; else "".
        unified: whether its memory is the machine's own, so that what it holds is missing there, too.
        bus_id: its PCI address, such as "0000:c1:00.0"; "" when it has none or nobody tells.
    """

    id: str
    description: str
    total_bytes: int
    free_bytes: int
    backend: str = CPU
    usable: bool = True
    reason: str = ""
    unified: bool = False
    bus_id: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """An accelerator as its driver shows it, whether the engine can use it or not.

    Attributes:
        vendor: "nvidia", "amd" or "intel".
        number: the driver's.
        description: what it is, for people.
        bus_id: its PCI address in lower case; "" when the driver cannot tell.
        total_bytes: its own memory; None when it has none, or when the driver does not tell.
        free_bytes: of that, what is free now, whoever uses the rest; None when the driver does not tell.
        fault: why nothing can use it now; "" when it works.
    """

    vendor: str
    number: int
    description: str
    bus_id: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class EngineDevice:
    """A device that a backend of the engine offered to the probe.

    Attributes:
        id, backend, bus_id: as in `Device`.
        kind: "gpu", or "igpu" when its memory is the machine's.
        description: what it is, for people.
        total_bytes, free_bytes: as the backend told when it was asked.
    """

    id: str
    backend: str
    kind: str
    description: str
    bus_id: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Probed:
    """What the engine answered, or why it did not.

    Attributes:
        devices: its accelerators, in its order.
        limits: variables of the environment that hide devices from it, with their values.
        fault: why there is no answer; "" when there is one.
    """

    devices: Sequence[EngineDevice] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""


class CardReader(Protocol):
    """A driver that can be asked."""

    def cards(self) -> Sequence[Card]:
        """Return its cards now. Blocks for milliseconds; thread-safe."""

    def look_again(self) -> None:
        """Forget what was concluded from a driver that was not there."""
