"""The inventory over time, on simulated machines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from lmd.daemon.devices import Inventory
from lmd.daemon.devices import inventory as module
from lmd.daemon.devices.values import Probed
from tests.support.device_sets import GIB, SimulatedMachine, card, machine_with, offered
from tests.support.leaks import until


@pytest.fixture
def machine(tmp_path: Path) -> SimulatedMachine:
    machine = SimulatedMachine(tmp_path / "machine.json")
    machine.write(machine_with(card(0), card(1)))
    return machine


@pytest.fixture
async def inventory(machine: SimulatedMachine) -> AsyncIterator[Inventory]:
    inventory = machine.inventory()
    inventory.start()
    yield inventory
    await inventory.stop()


def events(logs: list[Any]) -> list[tuple[str, str]]:
    return [(entry["event"], entry.get("device", "")) for entry in logs]


async def test_the_engine_is_asked_once_and_then_the_drivers_tell(
    machine: SimulatedMachine, inventory: Inventory
) -> None:
    assert [d.id for d in inventory.usable()] == ["cpu"], "nothing is promised before the engine has answered"
    await inventory.known()
    assert [(d.id, d.free_bytes // GIB) for d in inventory.usable()] == [("cpu", 60), ("cuda0", 23), ("cuda1", 23)]
    machine.write(machine_with(card(0, free_gib=7), card(1)))
    assert [d.free_bytes // GIB for d in inventory.usable()] == [60, 7, 23], "another program took it"
    await inventory.known()
    assert machine.probes == 1


async def test_an_engine_without_accelerators_is_not_asked(machine: SimulatedMachine) -> None:
    machine.write(machine_with(card(0), backends=[]))
    inventory = machine.inventory()
    inventory.start()
    await inventory.known()
    assert (machine.probes, [d.id for d in inventory.usable()]) == (0, ["cpu"])
    assert inventory.shortfall() == "nvidia0 (NVIDIA L4) cannot be used: the engine is built without CUDA or Vulkan"
    await inventory.refresh()
    assert machine.probes == 1, "who asks for it gets a fresh look"


async def test_a_device_that_fails_is_said_once_and_comes_back(machine: SimulatedMachine, inventory: Inventory) -> None:
    await inventory.known()
    inventory.devices()
    with capture_logs() as logs:
        machine.write(machine_with(card(0, fault="GPU is lost"), card(1)))
        for _ in range(3):
            assert [d.id for d in inventory.usable()] == ["cpu", "cuda1"]
        assert events(logs) == [("device_lost", "cuda0")]
        assert inventory.faults() == {"cuda0": "GPU is lost"}
        machine.write(machine_with(card(0), card(1)))
        assert [d.id for d in inventory.usable()] == ["cpu", "cuda0", "cuda1"]
    assert events(logs) == [("device_lost", "cuda0"), ("device_usable_again", "cuda0")]
    assert inventory.faults() == {}


async def test_a_card_that_is_unplugged_is_lost(machine: SimulatedMachine, inventory: Inventory) -> None:
    await inventory.known()
    inventory.devices()
    machine.write(machine_with(card(1)))
    assert [d.id for d in inventory.usable()] == ["cpu", "cuda1"]
    assert inventory.faults() == {"cuda0": "its driver does not show it any more"}


async def test_a_failure_is_noticed_while_nobody_asks(machine: SimulatedMachine) -> None:
    inventory = machine.inventory(look_s=0.01)
    inventory.start()
    try:
        await inventory.known()
        inventory.devices()
        machine.write(machine_with(card(0), card(1, fault="GPU is lost")))
        await until(lambda: inventory.faults() == {"cuda1": "GPU is lost"})
    finally:
        await inventory.stop()


async def test_refresh_finds_a_new_card_and_keeps_the_ids_of_the_others(
    machine: SimulatedMachine, inventory: Inventory
) -> None:
    await inventory.known()
    new = card(2)
    # The engine finds the new card first, and numbers anew.
    order = [offered(2, id="cuda0"), offered(0, id="cuda1"), offered(1, id="cuda2")]
    machine.write(machine_with(card(0), card(1), new, devices=order))
    await inventory.refresh()
    assert {d.bus_id: d.id for d in inventory.usable() if d.bus_id} == {
        "0000:01:00.0": "cuda0",
        "0000:02:00.0": "cuda1",
        "0000:03:00.0": "cuda2",
    }


async def test_calls_at_the_same_time_share_a_probe(machine: SimulatedMachine, inventory: Inventory) -> None:
    await asyncio.gather(inventory.known(), inventory.refresh(), inventory.refresh(), inventory.known())
    assert machine.probes == 1


async def test_who_waits_for_a_probe_can_leave_without_ending_it_for_others(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def slow() -> Probed:
        await gate.wait()
        return Probed()

    inventory = Inventory(cards=(), probe=slow, backends=lambda: frozenset({"cuda"}))
    inventory.start()
    leaves, stays = asyncio.create_task(inventory.known()), asyncio.create_task(inventory.known())
    await asyncio.sleep(0)
    leaves.cancel()
    gate.set()
    await stays
    assert leaves.cancelled()
    await inventory.stop()


async def test_a_probe_that_failed_is_tried_again_by_who_needs_it(
    machine: SimulatedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = machine_with(card(0))
    machine.write(good | {"probed": {"fault": "the engine's probe died (SIGABRT)"}})
    inventory = machine.inventory()
    await inventory.known()
    assert inventory.shortfall() == "nvidia0 (NVIDIA L4) cannot be used: the engine's probe died (SIGABRT)"
    machine.write(good)
    await inventory.known()
    assert machine.probes == 1, "not at once: a driver that hangs would delay every load"
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    await inventory.known()
    assert [d.id for d in inventory.usable()] == ["cpu", "cuda0"]


async def test_a_refresh_that_fails_keeps_what_is_known(machine: SimulatedMachine, inventory: Inventory) -> None:
    await inventory.known()
    machine.write(machine_with(card(0), card(1)) | {"probed": {"fault": "the engine's probe died (SIGKILL)"}})
    with capture_logs() as logs:
        await inventory.refresh()
    assert ("device_probe_failed", "") in events(logs)
    assert [d.id for d in inventory.usable()] == ["cpu", "cuda0", "cuda1"]


async def test_what_we_hold_counts_where_no_driver_tells(machine: SimulatedMachine) -> None:
    machine.write(machine_with(devices=[offered(0)]))
    inventory = machine.inventory()
    held = {"cuda0": 4 * GIB}
    inventory.held = lambda: held
    await inventory.refresh()
    assert inventory.usable()[1].free_bytes == 23 * GIB, "the engine saw what was held then"
    held = {"cuda0": 9 * GIB}
    assert inventory.usable()[1].free_bytes == 18 * GIB
    held = {}
    assert inventory.usable()[1].free_bytes == 24 * GIB, "and no more than there is"
