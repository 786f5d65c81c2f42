"""What residency does for several models and callers: turns, keep-alives, pins, watchers and the spare runner."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from lmd.daemon.errors import DeviceMemoryShort, NotPinned, QueueFull
from lmd.daemon.residency.pins import KEY, KIND, Pins
from lmd.daemon.residency.values import LoadSettings, RunnerState
from lmd.daemon.residency.watching import RunnersSeen
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest
from tests.support.inference_bench import Bench, Catalog, text_of
from tests.support.leaks import nothing_left_in, until
from tests.support.residents import Model, Threads, World

HOUR = timedelta(hours=1)
AT_ONCE = timedelta(0)


@pytest.fixture
def no_leaks(tmp_path: Path) -> Iterator[None]:
    with nothing_left_in(tmp_path / "run" / "runners"):
        yield


@pytest.fixture
async def world(tmp_path: Path, no_leaks: None) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


def actor_of(world: World, model: Model):  # type: ignore[no-untyped-def]
    return world.residency._actors[str(model.manifest_digest)]


# Turns


async def test_a_turn_lets_what_runs_finish_and_what_waits_load_again(world: World) -> None:
    model = world.model("a", journal=world.journal())
    gate = world.path / "gate"
    running = await world.holding(model, f"gate {gate}")
    actor_of(world, model).yield_turn("is b's turn")
    status = world.status(model)
    assert status is not None
    assert (status.state, status.reason) == (RunnerState.DRAINING, "is b's turn")
    newcomer = asyncio.create_task(world.ask(model, "new"))
    await asyncio.sleep(0)
    assert not newcomer.done()
    assert len(world.loads()) == 1
    gate.touch()
    assert await running == "x"
    assert await newcomer == "new "
    assert len(world.loads()) == 2


async def test_a_turn_hands_back_what_only_waits_for_a_slot(bench: Bench) -> None:
    """Behind two slots four requests waited: a turn that had to serve them first came after two more answers."""
    world = bench.world
    model = bench.model(journal=world.journal())
    gate = world.path / "gate"
    running = [asyncio.create_task(bench.generate(f"gate {gate}")) for _ in range(2)]
    await until(lambda: (s := world.status(model)) is not None and s.slots_busy == 2)
    queued = [asyncio.create_task(bench.generate(f"word{n}")) for n in range(4)]
    await until(lambda: (s := world.status(model)) is not None and s.queued == 4)
    actor = actor_of(world, model)
    actor.yield_turn("somebody waits")
    await until(lambda: actor.usage().queued == 4 and len(actor._requests.admitted) == 2)
    gate.touch()
    assert list(map(text_of, await asyncio.gather(*running))) == ["x", "x"]
    assert list(map(text_of, await asyncio.gather(*queued))) == [f"word{n} " for n in range(4)]
    assert len(world.loads()) == 2


async def test_what_is_handed_back_finds_a_place_in_a_full_queue(world: World) -> None:
    world.limits = replace(world.limits, max_queue=1)
    model = world.model("a")
    waiting = world.residency.enqueue(model, LoadSettings(num_ctx=64))
    with waiting:
        with pytest.raises(QueueFull):
            world.residency.enqueue(model, LoadSettings(num_ctx=64))
        with world.residency.enqueue(model, LoadSettings(num_ctx=64), again=True) as again:
            assert await again.wait(20)


async def test_a_turn_that_nobody_takes_in_time_is_called_off(world: World) -> None:
    """An answer that goes on for ever must not keep out those who ask for the same model."""
    world.limits = replace(world.limits, wait_s=0.2)
    model = world.model("a", journal=world.journal())
    running = await world.holding(model)
    actor_of(world, model).yield_turn("somebody waits")
    assert await world.ask(model, "small") == "small "
    assert world.state(model) is RunnerState.READY
    assert len(world.loads()) == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_turn_can_be_called_off(world: World) -> None:
    model = world.model("a", journal=world.journal())
    running = await world.holding(model)
    actor = actor_of(world, model)
    actor.yield_turn("somebody waits")
    newcomer = asyncio.create_task(world.ask(model, "new"))
    await asyncio.sleep(0)
    actor.keep_turn()
    assert await newcomer == "new "
    assert len(world.loads()) == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_turn_is_called_off_when_who_wanted_it_leaves(world: World) -> None:
    """Otherwise a client that hangs up costs those who use the model a load."""
    world.free_bytes = 1000
    a, b = world.model("a", journal=world.journal()), world.model("b")
    running = await world.holding(a)
    newcomer = asyncio.create_task(world.ask(b, "y"))
    await until(lambda: world.state(a) is RunnerState.DRAINING)
    newcomer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await newcomer
    await until(lambda: world.state(a) is RunnerState.READY)
    assert await world.ask(a, "small") == "small "
    assert len(world.loads()) == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_what_is_handed_back_does_not_bring_an_old_version_back(world: World) -> None:
    old = world.model("v")
    new = replace(world.model("w"), name=old.name, digest=Digest.of(b"new"))
    await world.ask(old, "x")
    await world.ask(new, "x")
    with world.residency.enqueue(old, LoadSettings(num_ctx=64), again=True) as ticket:
        assert await ticket.wait(20)
        ticket.raise_refusal()
    assert {status.digest for status in world.residency.list() if status.state is RunnerState.READY} == {
        old.manifest_digest,
        new.manifest_digest,
    }
    assert await world.residency.unload(new.name, force=False) == 0
    assert world.status(new) is None


async def test_a_model_that_is_always_asked_gives_others_their_turn(world: World) -> None:
    """llama.cpp #28443: of those who wait for one place one starved. Here three clients never leave a gap."""
    world.free_bytes = 1000
    a, b = world.model("a"), world.model("b", journal=world.journal())
    answered: list[str] = []
    over = asyncio.Event()

    async def insist() -> None:
        while not over.is_set():
            answered.append(await world.ask(a, "count 50"))

    clients = [asyncio.create_task(insist()) for _ in range(3)]
    await until(lambda: len(answered) > 3)
    async with asyncio.timeout(60):
        assert await world.ask(b, "turn") == "turn "
    before = len(answered)
    await until(lambda: len(answered) > before + 3)  # and gets its own back
    over.set()
    await asyncio.gather(*clients)
    assert set(answered) == {"x" * 50}
    assert len(world.loads()) == 1


# Keep-alive


async def test_nobody_shortens_what_another_caller_asked_for(world: World) -> None:
    """Ollama lets every request overwrite the keep-alive: one client with 0 unloads the model of all others."""
    world.keep_alive = timedelta(milliseconds=20)
    model = world.model("a")
    await world.ask(model, "x", keep_alive=HOUR, caller="uid:1")
    await world.ask(model, "x", keep_alive=AT_ONCE, caller="uid:2")
    await world.ask(model, "x", caller="uid:3")
    status = world.status(model)
    assert status is not None
    assert status.expires_at is not None
    assert status.expires_at.timestamp() - time.time() > 3500
    await world.ask(model, "x", keep_alive=AT_ONCE, caller="uid:1")
    await until(lambda: world.status(model) is None)


async def test_zero_unloads_at_once_when_nobody_else_wants_more(world: World) -> None:
    model = world.model("a")
    await world.ask(model, "x", keep_alive=AT_ONCE, caller="uid:1")
    await until(lambda: world.status(model) is None)


async def test_a_long_request_does_not_use_up_its_callers_keep_alive(world: World) -> None:
    world.keep_alive = AT_ONCE
    model = world.model("a")
    gate = world.path / "gate"
    running = asyncio.create_task(world.ask(model, f"gate {gate}", keep_alive=timedelta(seconds=30), caller="uid:1"))
    await until(lambda: (s := world.status(model)) is not None and s.slots_busy == 1)
    await world.ask(model, "x", caller="uid:2")
    gate.touch()
    await running
    assert world.state(model) is RunnerState.READY


async def test_jumps_of_the_clock_neither_unload_nor_keep(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = world.model("a")
    await world.ask(model, "x", keep_alive=HOUR)
    real = time.time
    for jump_s in (10 * 365 * 86400, -10 * 365 * 86400):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
        assert await world.ask(model, "y") == "y "
        assert world.state(model) is RunnerState.READY
        status = world.status(model)
        assert status is not None
        assert status.load_duration is not None
        assert timedelta(0) <= status.load_duration < HOUR
    await world.ask(model, "x", keep_alive=AT_ONCE)
    await until(lambda: world.status(model) is None)


# Pins


def pins_of(world: World, *models: Model, preload: tuple[str, ...] = ()) -> Pins:
    catalog = Catalog()
    for model in models:
        catalog.add(model)
    return Pins(world.residency, catalog.resolve, world.memory, Threads(), preload)


async def pinned(pins: Pins, model: Model, **parameters: object) -> None:
    async for _ in pins.pin(model.name, parameters):
        pass


def saved(world: World) -> object:
    return json.loads(world.memory.facts.get((KIND, KEY), "{}"))


async def test_a_pinned_model_is_neither_evicted_nor_expires(world: World) -> None:
    world.free_bytes = 1000
    world.keep_alive = AT_ONCE
    a, b = world.model("a"), world.model("b")
    pins = pins_of(world, a, b)
    await pinned(pins, a, num_ctx=512)
    status = world.status(a)
    assert status is not None
    assert status.pinned
    assert not status.keep_forever
    assert status.expires_at is None
    with pytest.raises(DeviceMemoryShort) as caught:
        await world.ask(b, "x")
    assert "`lm unpin a:latest`" in caught.value.hint
    assert world.state(a) is RunnerState.READY
    assert await pins.unpin("A") == a.name
    assert await world.ask(b, "x") == "x "


async def test_a_pin_that_does_not_fit_is_an_error_with_numbers_and_no_pin(world: World) -> None:
    world.free_bytes = 1000
    a, b = world.model("a"), world.model("b")
    pins = pins_of(world, a, b)
    await pinned(pins, a, num_ctx=512)
    with pytest.raises(DeviceMemoryShort) as caught:
        await pinned(pins, b)
    assert caught.value.metadata["needed_bytes"] == "1000"
    assert caught.value.hint == "`a:latest` is pinned and holds 1000 B: `lm unpin a:latest` lets it go"
    assert list(saved(world)) == [a.name]  # type: ignore[call-overload]
    with pytest.raises(NotPinned, match="model `b` is not pinned") as unpinned:
        await pins.unpin("b")
    assert unpinned.value.hint == "pinned are `a:latest`"
    world.memory.needs("ctx=4096", 5000)
    with pytest.raises(DeviceMemoryShort):
        await pinned(pins, a, num_ctx=4096)  # and what was pinned before stays pinned as it was
    await until(lambda: world.state(a) is RunnerState.READY)
    status = world.status(a)
    assert status is not None
    assert status.pinned


async def test_pins_are_loaded_when_the_daemon_starts_again(world: World, tmp_path: Path) -> None:
    a, gone = world.model("a"), world.model("gone")
    pins = pins_of(world, a, gone)
    await pinned(pins, a, num_ctx=512)
    await pinned(pins, gone)
    await world.residency.stop()
    again = World(tmp_path, memory=world.memory)
    b = again.model("b")
    restarted = pins_of(again, a, b, preload=("b", "missing"))
    await restarted.start()
    await until(lambda: again.state(a) is again.state(b) is RunnerState.READY)
    listed = {status.name: (status.pinned, status.context_length) for status in again.residency.list()}
    assert listed == {a.name: (True, 512), b.name: (False, 4096)}
    await until(lambda: list(saved(again)) == [a.name])  # type: ignore[call-overload]
    await restarted.stop()
    await again.close()


async def test_a_pinned_model_whose_runner_dies_comes_back_by_itself(world: World) -> None:
    model = world.model("a", journal=world.journal())
    await pinned(pins_of(world, model), model)
    status = world.status(model)
    assert status is not None
    psutil.Process(status.pid).kill()
    await until(lambda: len(world.loads()) == 2 and world.state(model) is RunnerState.READY)


async def test_a_pin_follows_its_name(world: World) -> None:
    old = world.model("v")
    new = replace(world.model("w"), name=old.name, digest=Digest.of(b"new"))
    await pinned(pins_of(world, old), old)
    await world.ask(new, "x")
    await until(lambda: world.status(old) is None)
    status = world.status(new)
    assert status is not None
    assert status.pinned


async def test_a_pin_with_a_wrong_parameter_pins_nothing(world: World) -> None:
    model = world.model("a")
    with pytest.raises(InvalidRequest, match="num_ctx"):
        await pinned(pins_of(world, model), model, num_ctx=1)
    assert world.status(model) is None
    assert saved(world) == {}


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a:latest": 3}'])
async def test_a_damaged_record_of_pins_counts_as_none(world: World, text: str) -> None:
    world.memory.facts[KIND, KEY] = text
    pins = pins_of(world)
    await pins.start()
    await pins.stop()


# Watching


async def test_watchers_see_each_change_with_its_reason(world: World) -> None:
    world.keep_alive = AT_ONCE
    model = world.model("a")
    seen: list[RunnersSeen] = []
    note = seen.append

    async def watch() -> None:
        async for picture in world.residency.watch():
            note(picture)

    watching = asyncio.create_task(watch())
    await until(lambda: len(seen) == 1)
    assert seen[0] == RunnersSeen((), ())
    await world.ask(model, "x")
    await until(lambda: any(c.state is None for picture in seen for c in picture.changes))
    changes = [(change.state, change.reason) for picture in seen for change in picture.changes]
    assert [state for state, _ in changes if state is not RunnerState.LOADING] == [
        RunnerState.READY,
        RunnerState.DRAINING,
        None,
    ]
    assert changes[0][0] is RunnerState.LOADING
    assert changes[-1][1] == "was not used"
    assert seen[-1].runners == ()
    await world.residency.stop()
    async with asyncio.timeout(20):
        await watching  # ends with the daemon, which it must not hold up


# The spare runner


async def test_a_load_takes_the_spare_runner(world: World) -> None:
    world.spare_runner = True
    a, b = world.model("a", stderr="words of a"), world.model("b", stderr="words of b")
    spare = world.residency._spare
    assert spare.pid == 0  # a daemon that nobody uses has none
    await world.ask(a, "x")
    await until(lambda: spare.pid != 0)
    pid = spare.pid
    assert [status.name for status in world.residency.list()] == [a.name]
    assert await world.ask(b, "y") == "y "
    status = world.status(b)
    assert status is not None
    assert status.pid == pid
    assert status.memory_bytes == 1000
    logged = world.path / "log" / f"runner-{b.manifest_digest.short}.log"
    assert logged.exists()
    await until(lambda: spare.pid not in (0, pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_spare_that_is_dead_or_stuck_costs_a_process_and_no_request(
    world: World, number: signal.Signals
) -> None:
    world.spare_runner = True
    a, b = world.model("a"), world.model("b")
    await world.ask(a, "x")
    spare = world.residency._spare
    await until(lambda: spare.pid != 0)
    pid = spare.pid
    os.kill(pid, number)
    assert await world.ask(b, "y") == "y "
    await until(lambda: not psutil.pid_exists(pid))


async def test_no_spare_is_started_when_memory_is_short(world: World) -> None:
    world.spare_runner = True
    world.free_bytes = 100 << 20
    await world.ask(world.model("a"), "x")
    spare = world.residency._spare
    await until(lambda: spare._starting is None)
    assert spare.pid == 0
