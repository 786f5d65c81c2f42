"""Leases of memory beside models: what leaves for them, what they wait for, and what their programs use."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from lmd.daemon.errors import DeviceMemoryShort, Draining, LeaseMemoryShort
from lmd.daemon.process_memory import ProcessTree
from lmd.daemon.residency.leasing import LeaseGranted, LeaseWaiting
from lmd.daemon.residency.values import FOR_EVER, RunnerState
from lmd.registry.errors import InvalidRequest
from tests.support.leaks import until
from tests.support.residents import World

TREE = ProcessTree(pid=1, created=0.0, uid=0)

Holding = AsyncGenerator[LeaseWaiting | LeaseGranted, None]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path, free_bytes=3000)
    yield made
    await made.close()


@asynccontextmanager
async def granted(holding: Holding) -> AsyncIterator[LeaseGranted]:
    async with asyncio.timeout(30), aclosing(holding):
        async for event in holding:
            if isinstance(event, LeaseGranted):
                yield event
                return
    raise AssertionError("the lease ended without being granted")


async def test_memory_that_is_free_is_granted_at_once(world: World) -> None:
    async with granted(world.residency.leases.hold(2000, purpose="a training")) as lease:
        assert lease == LeaseGranted("cpu", 2000)
        assert world.residency.leases.leased_bytes("cpu") == 2000
    assert world.residency.leases.leased_bytes("cpu") == 0


async def test_idle_models_leave_for_it_and_no_more_than_it_takes(world: World) -> None:
    old, new = world.model("old"), world.model("new")
    await world.ask(old, "hi")
    await world.ask(new, "hi")
    async with granted(world.residency.leases.hold(2000)):
        assert world.state(old) is None
        assert world.state(new) is RunnerState.READY


async def test_a_busy_model_is_waited_for_and_finishes_its_answer(world: World) -> None:
    busy = world.model("busy")
    answer = await world.holding(busy)
    async with asyncio.timeout(30), aclosing(world.residency.leases.hold(2500)) as events:
        waiting = await anext(events)
        assert isinstance(waiting, LeaseWaiting)
        assert "`busy:latest` holds" in waiting.detail
        assert not answer.done()
        answer.cancel()
        while isinstance(event := await anext(events), LeaseWaiting):
            pass
        assert event == LeaseGranted("cpu", 2500)
        assert world.state(busy) is None


async def test_a_model_that_needs_the_memory_is_refused_while_the_lease_lasts(world: World) -> None:
    """Nobody knows when a program ends: waiting for it would only hide that there is no room."""
    model = world.model("model")
    async with granted(world.residency.leases.hold(2500)):
        with pytest.raises(DeviceMemoryShort) as caught:
            await world.ask(model, "hi")
        assert caught.value.metadata["free_bytes"] == "500"
    assert await world.ask(model, "hi")


async def test_a_model_falls_back_to_main_memory_while_the_accelerator_is_leased(world: World) -> None:
    world.gpu_free_bytes = 3000
    model = world.model("model")
    async with granted(world.residency.leases.hold(2500)) as lease:
        assert lease.device == "cuda0"
        await world.ask(model, "hi")
        assert world.residency.list()[0].device == "cpu"


async def test_what_the_program_uses_counts_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    used_bytes = 700
    leases = world.residency.leases
    monkeypatch.setattr(leases, "_measure", lambda *_: used_bytes)
    model = world.model("model")
    async with granted(leases.hold(2500, tree=TREE)):
        # The program takes 2,000, which the machine's figures show; 500 of the lease are still to come.
        used_bytes += 2000
        world.free_bytes -= 2000
        with pytest.raises(DeviceMemoryShort) as caught:
            await world.ask(model, "hi")
        assert caught.value.metadata["free_bytes"] == "500"
        assert world.residency.tally(leases=True) == {"cpu": (2500, 2000)}
        # More than it leased: that is gone from the machine, and nothing is set aside any more.
        used_bytes += 1000
        world.free_bytes = 1000
        assert await world.ask(model, "hi")


async def test_a_lease_waits_for_another_one(world: World) -> None:
    """Who asks for one can wait for hours, and leave at any time; a model's request cannot."""
    leases = world.residency.leases
    first, second = leases.hold(2000, purpose="train"), leases.hold(2500)
    assert await anext(first) == LeaseGranted("cpu", 2000)
    waiting = await anext(second)
    assert isinstance(waiting, LeaseWaiting)
    assert "2.0 KiB for `train`" in waiting.detail
    assert leases.leased_bytes("cpu") == 2000
    await first.aclose()
    async with granted(second) as lease:
        assert lease == LeaseGranted("cpu", 2500)
        assert leases.leased_bytes("cpu") == 2500


async def test_many_leases_and_models_never_get_the_same_bytes(world: World) -> None:
    leases, most = world.residency.leases, 0

    async def borrow(size_bytes: int) -> None:
        nonlocal most
        async with granted(leases.hold(size_bytes)):
            most = max(most, leases.leased_bytes("cpu"))
            await asyncio.sleep(0)

    async def ask(number: int) -> None:
        with contextlib.suppress(DeviceMemoryShort):
            await world.ask(world.model(f"m{number}"), "hi")

    async with asyncio.timeout(30):
        await asyncio.gather(*(borrow(700 + 300 * (n % 5)) for n in range(12)), *(ask(n) for n in range(3)))
    assert 0 < most <= 3000
    assert leases.leased_bytes("cpu") == 0


async def test_more_than_the_device_has_is_refused_with_numbers_and_evicts_nobody(world: World) -> None:
    model = world.model("model")
    await world.ask(model, "hi")
    with pytest.raises(LeaseMemoryShort):
        async with granted(world.residency.leases.hold(9000)):
            pass
    assert world.state(model) is RunnerState.READY


async def test_a_model_that_stays_for_ever_is_no_victim(world: World) -> None:
    model = world.model("model")
    await world.ask(model, "hi", keep_alive=FOR_EVER)
    with pytest.raises(LeaseMemoryShort):
        async with granted(world.residency.leases.hold(2500)):
            pass
    assert world.state(model) is RunnerState.READY


async def test_leaving_while_waiting_leaves_nothing_behind(world: World) -> None:
    busy = world.model("busy")
    answer = await world.holding(busy)
    holding = world.residency.leases.hold(2500)
    assert isinstance(await anext(holding), LeaseWaiting)
    await holding.aclose()
    other = world.model("other")
    assert await world.ask(other, "hi")
    assert not answer.done()
    answer.cancel()
    await until(answer.done)


async def test_a_daemon_that_stops_tells_who_holds_a_lease(world: World) -> None:
    holding = world.residency.leases.hold(1000)
    assert isinstance(await anext(holding), LeaseGranted)
    world.residency.drain()
    with pytest.raises(Draining):
        await anext(holding)
    with pytest.raises(Draining):
        await anext(world.residency.leases.hold(1000))


@pytest.mark.parametrize(
    ("size_bytes", "device", "field"), [(0, "", "bytes"), (-1, "", "bytes"), (1, "tpu9", "device")]
)
async def test_what_cannot_be_leased(world: World, size_bytes: int, device: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await anext(world.residency.leases.hold(size_bytes, device=device))
    assert caught.value.metadata["field"] == field
