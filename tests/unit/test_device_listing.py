"""Who has the memory of a device: models, leases, others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmd.daemon.devices import Device
from lmd.daemon.services.devices import DeviceListing
from lmd.v1 import runtime_service_pb2 as pb
from tests.support.residents import Threads

LOST = Device("cuda1", "NVIDIA L4", 24, 0, backend="cuda", usable=False, reason="GPU is lost")


@dataclass
class Inventory:
    found: list[Device]
    refreshed: int = 0

    def devices(self) -> list[Device]:
        return self.found

    async def refresh(self) -> None:
        self.refreshed += 1


@dataclass
class Tally:
    models: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    leases: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __call__(self, *, leases: bool) -> Mapping[str, tuple[int, int]]:
        return self.leases if leases else self.models


async def bandwidth(device: str) -> int:
    return 300 if device == "cuda0" else 0


async def look() -> None:
    """There are no leases whose programs could be looked at."""


async def listed(*devices: Device, tally: Tally | None = None, refresh: bool = False) -> list[pb.ComputeDevice]:
    listing = DeviceListing(Inventory(list(devices)), tally or Tally(), Threads(), bandwidth, look)
    return list((await listing.response(pb.ListDevicesRequest(refresh=refresh))).devices)


async def test_what_nobody_of_ours_holds_is_others() -> None:
    gpu = Device("cuda0", "NVIDIA L4", 24, 4, backend="cuda")
    [entry] = await listed(gpu, tally=Tally({"cuda0": (10, 10)}, {"cuda0": (6, 2)}))
    assert (entry.held_bytes, entry.leased_bytes, entry.others_bytes) == (10, 6, 24 - 4 - 10 - 2)
    assert entry.free_bytes == 0, "4 are free, and promised to the lease"
    assert entry.bandwidth_bytes == 300


async def test_what_is_mapped_or_still_loading_is_held_but_does_not_show() -> None:
    cpu = Device("cpu", "main memory", 64, 60)
    [entry] = await listed(cpu, tally=Tally({"cpu": (30, 1)}))
    assert (entry.held_bytes, entry.others_bytes) == (30, 3)
    assert entry.free_bytes == 64 - 30 - 3, "the columns add up to the whole"


async def test_a_reading_that_lags_behind_leaves_nothing_to_others() -> None:
    [entry] = await listed(Device("cuda0", "NVIDIA L4", 24, 23, backend="cuda"), tally=Tally({"cuda0": (10, 10)}))
    assert entry.others_bytes == 0


async def test_of_a_device_that_cannot_be_read_nothing_is_known_of_others() -> None:
    [entry] = await listed(LOST, tally=Tally({"cuda1": (10, 10)}))
    assert (entry.usable, entry.reason, entry.held_bytes, entry.others_bytes) == (False, "GPU is lost", 10, 0)


async def test_only_who_asks_for_it_makes_the_inventory_look_again() -> None:
    inventory = Inventory([LOST])
    listing = DeviceListing(inventory, Tally(), Threads(), bandwidth, look)
    await listing.response(pb.ListDevicesRequest())
    assert inventory.refreshed == 0
    await listing.response(pb.ListDevicesRequest(refresh=True))
    assert inventory.refreshed == 1
