"""A reload for which there is no memory: who asked for it is refused, and the runner that works stays."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from lmd.daemon.devices import Device
from lmd.daemon.errors import DeviceMemoryShort, Draining, Unloaded
from lmd.daemon.residency import ledger
from lmd.daemon.residency.pins import Pins
from lmd.daemon.residency.values import FOR_EVER, LoadSettings, RunnerState
from tests.support.in_process import Host
from tests.support.leaks import until
from tests.support.residents import LIMITS, Model, Threads, World

SMALL, MIDDLE, LARGE = LoadSettings(num_ctx=512), LoadSettings(num_ctx=1024), LoadSettings(num_ctx=4096)


class Machine(World):
    """A machine of 1000 bytes whose reading a test can hold up."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, host=Host(), free_bytes=1000)
        self.memory.needs("ctx=512", 600)
        self.memory.needs("ctx=1024", 900)
        self.memory.needs("ctx=4096", 5000)
        self.reads = threading.Event()
        self.reads.set()
        self.held_up = threading.Event()

    def devices(self) -> list[Device]:
        if not self.reads.is_set():
            self.held_up.set()
            assert self.reads.wait(20)
        return super().devices()

    def pid(self, model: Model) -> int:
        status = self.status(model)
        assert status is not None
        assert status.state is RunnerState.READY
        return status.pid

    def contexts(self) -> list[str]:
        return [line.split()[0] for line in self.loads()]


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Machine]:
    monkeypatch.setattr(ledger, "LOAD_SETTLE_S", 0)
    made = Machine(tmp_path)
    yield made
    made.reads.set()
    await made.close()


def model_of(world: Machine, name: str = "a", memory_bytes: int = 600) -> Model:
    return world.model(name, memory_bytes=memory_bytes, journal=world.journal())


async def refused(world: Machine, model: Model, settings: LoadSettings = LARGE) -> DeviceMemoryShort:
    with pytest.raises(DeviceMemoryShort) as caught:
        await world.ask(model, "x", settings)
    return caught.value


async def test_a_reload_that_cannot_be_had_leaves_the_runner_alone(world: Machine) -> None:
    """The working runner was unloaded first, and what could not be had was refused then."""
    model = model_of(world)
    await world.ask(model, "x", SMALL)
    pid = world.pid(model)
    error = await refused(world, model)
    assert (error.metadata["needed_bytes"], error.metadata["free_bytes"]) == ("5000", "1000")
    assert world.pid(model) == pid
    assert await world.ask(model, "y", SMALL) == "y "
    assert world.contexts() == ["512"]
    assert "does not fit" in world.residency.recent_plans()[0].plan.reason


async def test_a_pin_that_cannot_be_had_leaves_the_pinned_runner_alone(world: Machine) -> None:
    """`lm pin -o num_ctx=...` of a pinned model unloaded it, and only then said that it does not fit."""
    model = model_of(world)

    async def resolve(text: str) -> Model:
        return model

    pins = Pins(world.residency, resolve, world.memory, Threads())
    async for _ in pins.pin(model.name, {"num_ctx": 512}):
        pass
    pid = world.pid(model)
    with pytest.raises(DeviceMemoryShort) as caught:
        async for _ in pins.pin(model.name, {"num_ctx": 4096}):
            pass
    assert caught.value.metadata["needed_bytes"] == "5000"
    assert world.pid(model) == pid
    status = world.status(model)
    assert status is not None
    assert (status.pinned, status.reason) == (True, "")
    assert await world.ask(model, "y", MIDDLE) == "y "  # what can be had is had
    assert world.contexts() == ["512", "1024"]


async def test_only_those_are_refused_who_asked_for_it(world: Machine) -> None:
    model = model_of(world)
    gate = world.path / "gate"
    running = await world.holding(model, f"gate {gate}", settings=SMALL)
    pid = world.pid(model)
    tasks = [asyncio.create_task(world.ask(model, "x", settings)) for settings in (LARGE, SMALL, MIDDLE)]
    with pytest.raises(DeviceMemoryShort):
        await tasks[0]
    assert not running.done()  # nobody waited for it
    assert world.status(model).pid == pid  # type: ignore[union-attr]
    gate.touch()
    assert await running == "x"
    assert await asyncio.gather(*tasks[1:]) == ["x ", "x "]
    assert world.contexts() == ["512", "1024"]


async def test_what_the_runner_serves_is_not_refused_with_what_it_cannot(world: Machine) -> None:
    """Of two with the same context only one wants what is missing."""
    model = model_of(world)
    await world.ask(model, "x", LoadSettings(num_ctx=512, kv_type="q8_0"))
    world.memory.needs("ctx=512", 5000)  # with keys and values in f16; what it took with q8_0 is known
    pid = world.pid(model)
    exact = asyncio.create_task(world.ask(model, "x", LoadSettings(num_ctx=512, kv_type="f16")))
    await asyncio.sleep(0)
    other = asyncio.create_task(world.ask(model, "y", LoadSettings(num_ctx=512, kv_type="q8_0")))
    with pytest.raises(DeviceMemoryShort):
        await exact
    assert await other == "y "
    assert world.pid(model) == pid


async def test_memory_that_is_gone_when_the_answers_are_done_keeps_the_runner(world: Machine) -> None:
    model = model_of(world)
    gate = world.path / "gate"
    running = await world.holding(model, f"gate {gate}", settings=SMALL)
    larger = asyncio.create_task(world.ask(model, "x", MIDDLE))
    await until(lambda: world.state(model) is RunnerState.DRAINING)
    world.free_bytes = 700
    gate.touch()
    assert await running == "x"
    with pytest.raises(DeviceMemoryShort):
        await larger
    assert await world.ask(model, "y", SMALL) == "y "
    assert world.contexts() == ["512"]


async def test_a_reading_that_may_be_wrong_refuses_nobody(world: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner takes more for a moment when its load ends: that is no reason to refuse, nor to unload another one."""
    a, b = model_of(world), world.model("b", memory_bytes=900)
    await world.ask(a, "x", SMALL)
    world.free_bytes = 1900
    monkeypatch.setattr(ledger, "LOAD_SETTLE_S", 1000)
    await world.ask(b, "z", MIDDLE, keep_alive=FOR_EVER)
    pid = world.pid(a)
    world.free_bytes = 1000
    larger = asyncio.create_task(world.ask(a, "y", MIDDLE))
    await until(lambda: (status := world.status(a)) is not None and "settled" in status.reason)
    assert world.pid(a) == pid
    world.free_bytes = 1900
    assert await larger == "y "
    status = world.status(a)
    assert status is not None
    assert status.reason == ""


async def test_who_has_waited_long_enough_for_a_reading_is_refused(
    world: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.limits = replace(LIMITS, wait_s=0.1)
    monkeypatch.setattr(ledger, "LOAD_SETTLE_S", 1000)
    model = model_of(world)
    await world.ask(model, "x", SMALL)
    pid = world.pid(model)
    world.free_bytes = 600
    await refused(world, model, MIDDLE)
    assert await world.ask(model, "y", SMALL) == "y "
    assert world.pid(model) == pid


@pytest.mark.parametrize("how", ["leaves", "force", "drain"])
async def test_whatever_comes_while_it_asks_happens_at_once(world: Machine, how: str) -> None:
    model = model_of(world)
    await world.ask(model, "x", SMALL)
    pid = world.pid(model)
    world.reads.clear()
    ticket = world.residency.enqueue(model, LARGE)
    await until(world.held_up.is_set)
    behind = asyncio.create_task(world.ask(model, "y", SMALL))
    await asyncio.sleep(0)
    if how == "leaves":
        ticket.close()
        assert await behind == "y "
        assert world.pid(model) == pid
        return
    if how == "force":
        await world.residency.unload(model.name, force=True)
    else:
        await world.residency.stop()
    assert not world.is_alive(pid)
    error = Unloaded if how == "force" else Draining
    with pytest.raises(error):
        await behind
    assert await ticket.wait(20)
    with pytest.raises(error):
        ticket.raise_refusal()
    ticket.close()
