"""ListDevices: what the inventory knows of each device, and who holds its memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import grpc.aio

from lmd.daemon.devices import Device
from lmd.daemon.fitting import Fitting
from lmd.daemon.residency.facts import Pool
from lmd.daemon.residency.pins import Pins
from lmd.daemon.residency.residency import Residency
from lmd.daemon.services.memory import RuntimeMemoryServicer
from lmd.daemon.services.runtime import Models
from lmd.v1 import runtime_service_pb2 as pb


class DeviceInventory(Protocol):
    """The part of the inventory that is needed here."""

    def devices(self) -> list[Device]:
        """Return all devices as they are now; blocks for milliseconds."""

    async def refresh(self) -> None:
        """Look for devices that came or went."""


class Tally(Protocol):
    """Counts who holds what of each device."""

    def __call__(self, *, leases: bool) -> Mapping[str, tuple[int, int]]:
        """Return the bytes that models, or leases, hold of each device, and how many of them its readings show."""


@dataclass(frozen=True, slots=True)
class DeviceListing:
    """Puts the list together.

    *bandwidth* tells the bytes a second that decoding reads on a device at best, or 0; *look* brings up to date what
    the programs of leases use.
    """

    inventory: DeviceInventory
    tally: Tally
    pool: Pool
    bandwidth: Callable[[str], Awaitable[int]]
    look: Callable[[], Awaitable[None]]

    async def response(self, request: pb.ListDevicesRequest) -> pb.ListDevicesResponse:
        """Answer a call."""
        if request.refresh:
            await self.inventory.refresh()
        await self.look()
        devices = await self.pool.run(self.inventory.devices)
        models, leases = self.tally(leases=False), self.tally(leases=True)
        none = (0, 0)
        return pb.ListDevicesResponse(
            devices=[
                _message(
                    device, models.get(device.id, none), leases.get(device.id, none), await self.bandwidth(device.id)
                )
                for device in devices
            ]
        )


class RuntimeDevicesServicer(RuntimeMemoryServicer):
    """The whole service: the runners, what is asked about memory, and the devices."""

    def __init__(
        self, catalog: Models, residency: Residency, pins: Pins, fitting: Fitting, devices: DeviceListing
    ) -> None:
        super().__init__(catalog, residency, pins, fitting)
        self._devices = devices

    async def ListDevices(
        self,
        request: pb.ListDevicesRequest,
        context: grpc.aio.ServicerContext[pb.ListDevicesRequest, pb.ListDevicesResponse],
    ) -> pb.ListDevicesResponse:
        """Return the devices."""
        return await self._devices.response(request)


def _message(
    device: Device, models: tuple[int, int], leases: tuple[int, int], bandwidth_bytes: int
) -> pb.ComputeDevice:
    held_bytes, seen_bytes = models
    leased_bytes, seen_leased_bytes = leases
    used_bytes = device.total_bytes - device.free_bytes
    # Of a device that cannot be read, nothing is known of others.
    others_bytes = max(used_bytes - seen_bytes - seen_leased_bytes, 0) if device.usable else 0
    # What a model or a lease has not taken yet is nobody else's all the same.
    promised_bytes = max(held_bytes - seen_bytes, 0) + max(leased_bytes - seen_leased_bytes, 0)
    return pb.ComputeDevice(
        id=device.id,
        description=device.description,
        backend=device.backend,
        total_bytes=device.total_bytes,
        free_bytes=max(device.free_bytes - promised_bytes, 0),
        held_bytes=held_bytes,
        leased_bytes=leased_bytes,
        others_bytes=others_bytes,
        bandwidth_bytes=bandwidth_bytes,
        usable=device.usable,
        reason=device.reason,
    )
