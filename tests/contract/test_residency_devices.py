"""Residency on machines whose devices fail: simulated devices, fake runners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmd.daemon.errors import DeviceMemoryShort, DeviceUnavailable, RunnerCrashed
from lmd.daemon.residency.values import FOR_EVER, LoadSettings, RunnerState
from tests.support.device_sets import GIB, SimulatedMachine, card, machine_with
from tests.support.leaks import nothing_left_in, until
from tests.support.residents import World


@dataclass
class Place:
    """A world on a simulated machine."""

    world: World
    machine: SimulatedMachine

    def reason(self, name: str) -> str:
        return next(status.reason for status in self.world.residency.list() if status.name == f"{name}:latest")

    def device(self, name: str) -> str:
        return next(status.device for status in self.world.residency.list() if status.name == f"{name}:latest")


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    machine = SimulatedMachine(tmp_path / "machine.json")
    machine.write(machine_with(card(0)))
    world = World(tmp_path, device_source=machine.inventory())
    with nothing_left_in(tmp_path / "run" / "runners"):
        yield Place(world, machine)
        await world.close()


async def test_a_model_goes_to_the_card(place: Place) -> None:
    await place.world.ask(place.world.model("a", gpu=True), "x", keep_alive=FOR_EVER)
    assert (place.device("a"), place.reason("a")) == ("gpu", "")


async def test_a_lost_card_sends_models_to_main_memory_and_they_say_so(place: Place) -> None:
    world = place.world
    await world.ask(world.model("a", gpu=True), "x", keep_alive=FOR_EVER)
    place.machine.write(machine_with(card(0, fault="GPU is lost")))
    await world.ask(world.model("b", gpu=True), "x", keep_alive=FOR_EVER)
    assert place.device("b") == "cpu"
    assert place.reason("b") == "in main memory: cuda0 (NVIDIA L4) cannot be used: GPU is lost"
    assert place.reason("a") == "cuda0 is lost: GPU is lost"
    place.machine.write(machine_with(card(0)))
    await world.ask(world.model("c", gpu=True), "x", keep_alive=FOR_EVER)
    assert (place.device("c"), place.reason("c"), place.reason("a")) == ("gpu", "", "")


async def test_an_engine_that_finds_no_card_in_a_runner_is_said(place: Place) -> None:
    await place.world.ask(place.world.model("a", gpu=False), "x", keep_alive=FOR_EVER)
    assert place.reason("a") == "in main memory: the engine of its runner finds no accelerator"


async def test_memory_of_other_programs_counts(place: Place) -> None:
    place.machine.write(machine_with(card(0, free_gib=0)))
    await place.world.ask(place.world.model("a", gpu=True), "x", keep_alive=FOR_EVER)
    assert place.device("a") == "cpu"
    with pytest.raises(DeviceMemoryShort, match="cuda0"):
        await place.world.ask(place.world.model("b", gpu=True), "x", LoadSettings(num_ctx=64, num_gpu=99))


async def test_a_required_card_that_is_lost_refuses_at_once_and_serves_when_it_is_back(place: Place) -> None:
    world = place.world
    world.require_gpu = True
    a = world.model("a", gpu=True)
    place.machine.write(machine_with(card(0, fault="GPU is lost")))
    for _ in range(3):  # no pause after a failure: the runner is not to blame
        with pytest.raises(DeviceUnavailable, match=r"GPU is lost; `runtime\.require_gpu` forbids main memory"):
            await world.ask(a, "x")
    assert world.loads() == []
    # Whoever asks for main memory gets it.
    assert await world.ask(world.model("b"), "x", LoadSettings(num_ctx=64, num_gpu=0)) == "x "
    place.machine.write(machine_with(card(0)))
    assert await world.ask(a, "x") == "x "


async def test_a_required_card_that_is_full_is_not_replaced_by_main_memory(place: Place) -> None:
    place.world.require_gpu = True
    place.machine.write(machine_with(card(0, free_gib=0)))
    with pytest.raises(DeviceMemoryShort, match="cuda0"):
        await place.world.ask(place.world.model("a", gpu=True), "x")


async def test_an_engine_that_finds_no_card_is_refused_when_one_is_required(place: Place) -> None:
    place.world.require_gpu = True
    with pytest.raises(DeviceUnavailable, match="the engine of its runner finds no accelerator"):
        await place.world.ask(place.world.model("a", gpu=False), "x")
    assert place.world.residency.tally(leases=False) == {}


async def test_a_device_that_goes_between_plan_and_load_is_looked_for_and_the_load_goes_elsewhere(place: Place) -> None:
    world = place.world
    await world.ask(world.model("a", gpu=True), "x", keep_alive=FOR_EVER)
    # The driver shows the card; the engine does not find it any more.
    place.machine.write(machine_with(card(0), devices=[]))
    assert await world.ask(world.model("b", gpu=True, load="device gone"), "x", keep_alive=FOR_EVER) == "x "
    assert place.device("b") == "cpu"
    assert place.reason("b").startswith(
        "in main memory: nvidia0 (NVIDIA L4) cannot be used: the engine does not find it"
    )
    assert place.machine.probes == 2


async def test_a_required_device_that_goes_between_plan_and_load_is_said_by_its_name(place: Place) -> None:
    place.world.require_gpu = True
    with pytest.raises(DeviceUnavailable, match="as scripted"):
        await place.world.ask(place.world.model("a", gpu=True, load="device gone"), "x")
    assert place.machine.probes == 2, "looked for once, and not for ever"
    assert place.world.residency.tally(leases=False) == {}


async def test_what_models_hold_is_told_by_device(place: Place) -> None:
    world = place.world
    await world.ask(world.model("a", gpu=True, memory_bytes=700), "x", keep_alive=FOR_EVER)
    await world.ask(world.model("b", memory_bytes=300), "x", LoadSettings(num_ctx=64, num_gpu=0), keep_alive=FOR_EVER)
    tally = world.residency.tally(leases=False)
    assert tally["cuda0"] == (700, 700)
    # Weights that are mapped do not show in the machine's figures.
    assert tally["cpu"] == (300, 0)
    assert world.residency.tally(leases=True) == {}


async def test_free_memory_is_reckoned_where_no_driver_tells_it(place: Place) -> None:
    document = machine_with(card(0))
    place.machine.write(document | {"cards": []})
    inventory = place.machine.inventory()
    place.world.device_source = inventory
    inventory.held = lambda: {id: seen for id, (_, seen) in place.world.residency.tally(leases=False).items()}
    await inventory.known()
    before = inventory.usable()[1].free_bytes
    await place.world.ask(place.world.model("a", gpu=True, memory_bytes=GIB), "x", keep_alive=FOR_EVER)
    assert inventory.usable()[1].free_bytes == before - GIB


async def test_a_runner_that_dies_with_its_card_says_so_to_its_own_requests(place: Place) -> None:
    world = place.world
    a, b = world.model("a", gpu=True), world.model("b")
    bystander = await world.holding(b, settings=LoadSettings(num_ctx=64, num_gpu=0))
    own = await world.holding(a)
    place.machine.write(machine_with(card(0, fault="GPU is lost")))
    with pytest.raises(RunnerCrashed, match="cuda0 is lost: GPU is lost; SIGABRT"):
        await world.ask(a, "abort")
    with pytest.raises(RunnerCrashed, match="cuda0 is lost: GPU is lost; SIGABRT"):
        await own
    assert not bystander.done()
    await until(lambda: world.state(a) is RunnerState.FAILED)
    assert "cuda0 is lost: GPU is lost" in place.reason("a")
    bystander.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bystander


async def test_a_runner_that_dies_while_its_card_lives_says_nothing_of_it(place: Place) -> None:
    a = place.world.model("a", gpu=True)
    with pytest.raises(RunnerCrashed, match=r"died \(SIGABRT\)"):
        await place.world.ask(a, "abort")
    await until(lambda: place.world.state(a) is RunnerState.FAILED)


async def test_a_driver_that_fails_then_does_not_keep_the_end_from_being_told(place: Place) -> None:
    await place.world.ask(place.world.model("a", gpu=True), "x", keep_alive=FOR_EVER)
    place.machine.file.unlink()
    a = place.world.model("a", gpu=True)
    with pytest.raises(RunnerCrashed, match=r"died \(SIGABRT\)"):
        await place.world.ask(a, "abort")
    await until(lambda: place.world.state(a) is RunnerState.FAILED)
    place.machine.write(machine_with(card(0)))
