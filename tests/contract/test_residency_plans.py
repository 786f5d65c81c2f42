"""What residency makes of plans: smaller contexts, turns, and what it tells of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from lmd.daemon.errors import DeviceMemoryShort
from lmd.daemon.residency import turns
from lmd.daemon.residency.plans import Action
from lmd.daemon.residency.values import LoadSettings, RunnerState
from lmd.daemon.services.plans import decision_message
from lmd.v1 import runtime_service_pb2 as pb
from tests.support.leaks import until
from tests.support.residents import World

WISH = LoadSettings(num_ctx=4096, min_ctx=1024)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


async def test_a_context_that_nobody_asked_for_is_as_large_as_fits(world: World) -> None:
    model = world.model("a", journal=world.journal())
    world.free_bytes = 500
    for num_ctx, bytes_ in ((4096, 1000), (3000, 800), (2048, 500), (1024, 300)):
        world.memory.needs(f"ctx={num_ctx}", bytes_)
    assert await world.ask(model, "x", WISH) == "x "
    assert await world.ask(model, "y", WISH) == "y "  # the larger one is not tried again
    assert [line.split()[0] for line in world.loads()] == ["2048"]
    with pytest.raises(DeviceMemoryShort):
        await world.ask(model, "z", LoadSettings(num_ctx=3000))


async def test_a_context_that_was_asked_for_wins_over_a_floor(world: World) -> None:
    """Who asks by name and who does not may wait for the same load."""
    model = world.model("a", gate=str(world.path / "gate"), journal=world.journal())
    world.free_bytes = 500
    world.memory.needs("ctx=4096", 1000)
    world.memory.needs("ctx=2048", 500)
    world.memory.needs("ctx=1500", 400)
    plain, named = world.residency, LoadSettings(num_ctx=1500)
    with plain.enqueue(model, WISH) as first, plain.enqueue(model, named) as second:
        (world.path / "gate").touch()
        assert await first.wait(20)
        assert await second.wait(20)
    assert [line.split()[0] for line in world.loads()] == ["2048"]


async def test_busy_models_take_turns(world: World) -> None:
    """A model that is always busy yields to one that has waited; its own requests come back after that."""
    world.free_bytes = 1000
    a, b = world.model("a", journal=world.journal()), world.model("b")
    gates = [world.path / "gate0", world.path / "gate1"]
    running = [await world.holding(a, f"gate {gate}") for gate in gates]
    other = asyncio.create_task(world.ask(b, "y"))
    await until(lambda: world.state(a) is RunnerState.DRAINING)
    assert not any(task.done() for task in running)
    newcomer = asyncio.create_task(world.ask(a, "again"))
    (turn, *_) = [d for d in world.residency.recent_plans() if d.plan.action is Action.TURN]
    assert (turn.name, turn.others) == ("b:latest", ("a:latest",))
    for gate in gates:
        gate.touch()
    assert [await task for task in running] == ["x", "x"]
    assert await other == "y "
    assert await newcomer == "again "
    assert len(world.loads()) == 2


async def test_what_waits_is_told_with_its_reason(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MIN_TURN_S", 60.0)
    world.free_bytes = 1000
    a, b = world.model("a"), world.model("b")
    busy = await world.holding(a)
    other = asyncio.create_task(world.ask(b, "y"))
    await until(lambda: bool(world.residency.waiting_plans()))
    message = decision_message(world.residency.waiting_plans()[0])
    assert message.name == "b:latest"
    assert message.action == pb.Decision.ACTION_WAIT
    assert list(message.others) == ["a:latest"]
    assert message.needed_bytes == 1000
    assert [(share.device, share.bytes) for share in message.shares] == [("cpu", 1000)]
    assert message.reason == "waits for memory that `a:latest` holds, on main memory: 1000 B needed, 0 B free"
    assert message.time.seconds > 0
    other.cancel()
    busy.cancel()
    await asyncio.wait([other, busy])
    await until(lambda: not world.residency.waiting_plans() and world.status(b) is None)
    assert {decision.name for decision in world.residency.recent_plans()} == {"a:latest", "b:latest"}


async def test_each_action_has_its_own_word(world: World) -> None:
    await world.ask(world.model("a"), "x")
    (decision,) = world.residency.recent_plans()
    words = {
        decision_message(replace(decision, plan=replace(decision.plan, action=action))).action for action in Action
    }
    assert words == set(pb.Decision.Action.values()) - {pb.Decision.ACTION_UNSPECIFIED}


async def test_a_turn_is_called_off_when_its_caller_leaves(world: World) -> None:
    world.free_bytes = 1000
    a, b = world.model("a", journal=world.journal()), world.model("b")
    gate = world.path / "gate"
    running = [await world.holding(a, f"gate {gate}") for _ in range(2)]
    other = asyncio.create_task(world.ask(b, "y"))
    await until(lambda: world.state(a) is RunnerState.DRAINING)
    other.cancel()
    await until(lambda: world.state(a) is RunnerState.READY)
    gate.touch()
    assert [await task for task in running] == ["x", "x"]
    assert await world.ask(a, "again") == "again "
    assert len(world.loads()) == 1
    await until(lambda: world.status(b) is None)
