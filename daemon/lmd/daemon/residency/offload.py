"""What a model may be loaded on, and what is said when that is not where it was meant to go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from lmd.daemon.devices import CPU, Device
from lmd.daemon.errors import DeviceUnavailable
from lmd.daemon.residency.facts import Pool
from lmd.daemon.residency.plans import DeviceMemory
from lmd.runner.v1 import frames_pb2 as frames

log = structlog.get_logger(__name__)


class DeviceSource(Protocol):
    """The part of the inventory that residency needs."""

    async def known(self) -> None:
        """Wait until it is known what there is."""

    async def refresh(self) -> None:
        """Look for devices that came or went."""

    def usable(self) -> Sequence[Device]:
        """Return what models can be loaded on now, main memory first; blocks for milliseconds."""

    def shortfall(self) -> str:
        """Say why models go to main memory although there is an accelerator; blocks for milliseconds."""

    def faults(self) -> Mapping[str, str]:
        """Return what is wrong with devices that were usable before, as was seen last; never blocks."""


@dataclass(frozen=True, slots=True)
class FixedDevices:
    """Devices that are known from the start, and never fail."""

    read: Callable[[], Sequence[Device]]

    async def known(self) -> None:
        """Return at once."""

    async def refresh(self) -> None:
        """Return at once."""

    def usable(self) -> Sequence[Device]:
        """Return them."""
        return self.read()

    def shortfall(self) -> str:
        """Return that nothing is wrong."""
        return ""

    def faults(self) -> Mapping[str, str]:
        """Return that nothing is wrong."""
        return {}


@dataclass(frozen=True, slots=True)
class Offload:
    """Chooses among the machine's devices. With *require_gpu* nothing goes to main memory that did not ask for it."""

    source: DeviceSource
    pool: Pool
    require_gpu: bool = False

    async def look_again(self) -> None:
        """Look for devices that came or went."""
        await self.source.refresh()

    async def devices(self) -> list[DeviceMemory]:
        """Return the devices that can be used, with their memory now."""
        return [DeviceMemory(d.id, d.total_bytes, d.free_bytes) for d in await self._usable()]

    async def allowed(self, name: str, *, num_gpu: int, gpu_offload: bool) -> tuple[str, ...]:
        """Return the ids of the devices that model *name* may go to, the best first.

        *num_gpu* is what was asked for: 0 means main memory, another number of layers an accelerator, -1 whatever is
        best. *gpu_offload* says whether the runner's engine finds an accelerator.

        Raises:
            DeviceUnavailable: there is none, and main memory is not allowed.
        """
        if num_gpu == 0:
            return (CPU,)
        gpus = await self._accelerators() if gpu_offload else ()
        if self.require_gpu:
            if not gpus:
                why = await self._why(gpu_offload=gpu_offload) or "the engine finds none"
                raise DeviceUnavailable(name, f"{why}; `runtime.require_gpu` forbids main memory")
            return gpus
        return gpus if gpus and num_gpu > 0 else (*gpus, CPU)

    async def bus_id(self, device: str) -> str:
        """Return the PCI address of a device, "" when it has none."""
        return next((found.bus_id for found in await self._usable() if found.id == device), "")

    async def parts(self, shares: Mapping[str, float]) -> list[frames.DevicePart]:
        """Return what a runner is told: each accelerator of *shares* with its part of the layers, and where it is."""
        places = {device.id: device.bus_id for device in await self._usable()}
        return [
            frames.DevicePart(device=device, part=part, bus_id=places.get(device, ""))
            for device, part in shares.items()
            if device != CPU
        ]

    async def remark(
        self, name: str, placed: Sequence[str], ready: frames.Ready, *, num_gpu: int, gpu_offload: bool
    ) -> str:
        """Return what is noteworthy about where a model came to be, "" for nothing, and log it.

        *placed* are the devices that it was given; the rest is as in `allowed`.

        Raises:
            DeviceUnavailable: the engine left an accelerator unused, and main memory is not allowed.
        """
        gpus = [device for device in placed if device != CPU]
        if gpus and ready.vram_bytes == 0 and ready.gpu_layers == 0:
            why = f"the engine put nothing on {' and '.join(gpus)}"
            if self.require_gpu:
                raise DeviceUnavailable(name, why)
        elif gpus or num_gpu == 0:
            return ""
        elif not (why := await self._why(gpu_offload=gpu_offload)):
            return ""
        log.warning("load_fell_back_to_main_memory", model=name, why=why)
        return f"in main memory: {why}"

    def fault_of(self, devices: Iterable[str]) -> str:
        """Say which of *devices* were lost, and why; "" when none was."""
        faults = self.source.faults()
        return "; ".join(f"{device} is lost: {faults[device]}" for device in devices if device in faults)

    async def fault_now(self, devices: Sequence[str]) -> str:
        """Look at *devices*, and say which of them were lost, and why; "" when none was."""
        await self.pool.run(self.source.usable)
        return self.fault_of(devices)

    async def _usable(self) -> Sequence[Device]:
        await self.source.known()
        return await self.pool.run(self.source.usable)

    async def _accelerators(self) -> tuple[str, ...]:
        return tuple(device.id for device in await self._usable() if device.id != CPU)

    async def _why(self, *, gpu_offload: bool) -> str:
        """Say why no accelerator is used; "" when there is none, or when nothing is wrong with it."""
        if not gpu_offload and await self._accelerators():
            return "the engine of its runner finds no accelerator"
        return await self.pool.run(self.source.shortfall)
