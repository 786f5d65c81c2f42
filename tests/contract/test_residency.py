"""Residency over runners that are processes, and over tasks that play them: who is loaded when, what requests get."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from lmd.daemon.adapter_scales import AdapterFile
from lmd.daemon.errors import (
    DeviceMemoryShort,
    Draining,
    ModelIncompatible,
    QueueFull,
    RunnerCrashed,
    RunnerHung,
    RunnerStartTimeout,
    Unloaded,
)
from lmd.daemon.residency.values import FOR_EVER, Limits, LoadSettings, RunnerState, RunnerStatus, Waiting
from lmd.daemon.runner_spec import RunnerTimings
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest, ModelNotFound
from lmd.registry.gguf import read_header
from lmd.registry.memory import estimate
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.gguf_bytes import TinyModel
from tests.support.in_process import Host
from tests.support.leaks import nothing_left_in, until
from tests.support.residents import LIMITS, SETTINGS, Model, World, collect, header


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
def no_leaks(tmp_path: Path) -> Iterator[None]:
    with nothing_left_in(tmp_path / "run" / "runners"):
        yield


@pytest.fixture(params=["processes", "tasks"])
async def world(tmp_path: Path, no_leaks: None, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A world with real processes, and one where a runner is a task of the same code."""
    made = World(tmp_path, host=Host() if request.param == "tasks" else None)
    yield made
    await made.close()


# Loading


async def test_first_requests_of_many_load_once(world: World) -> None:
    """LM Studio #1751: concurrent first requests each loaded the model."""
    model = world.model("a", journal=world.journal())
    texts = await asyncio.gather(*(world.ask(model, f"word{n}") for n in range(10)))
    assert texts == [f"word{n} " for n in range(10)]
    assert len(world.loads()) == 1


async def test_two_models_are_resident_side_by_side(world: World) -> None:
    a, b = world.model("a"), world.model("b")
    assert list(await asyncio.gather(world.ask(a, "x"), world.ask(b, "y"))) == ["x ", "y "]
    assert world.state(a) is world.state(b) is RunnerState.READY
    assert world.residency.resident_manifests() == {a.manifest_digest, b.manifest_digest}


async def test_a_slow_load_delays_nobody_else(world: World) -> None:
    """Ollama loads one model at a time: a request for a small one waits for the big one."""
    gate = world.path / "gate"
    slow, other = world.model("slow", gate=str(gate)), world.model("other")
    waiting = asyncio.create_task(world.ask(slow, "late"))
    await until(lambda: (s := world.status(slow)) is not None and s.pid == 0 and s.state is RunnerState.LOADING)
    assert await world.ask(other, "early") == "early "
    assert not waiting.done()
    gate.touch()
    assert await waiting == "late "


async def test_a_load_whose_weights_are_read_says_that_it_makes_room_for_the_context(world: World) -> None:
    gate = world.path / "gate"
    model = world.model("a", gate=str(gate), progress=1.0)
    with world.residency.enqueue(model, SETTINGS) as ticket:
        await until(lambda: ticket.status().load_fraction == 1)
        assert ticket.status().detail == f"makes room for a context of {SETTINGS.num_ctx} tokens"
        gate.touch()
        assert await ticket.wait(20)


async def test_status_while_it_loads_and_serves(world: World) -> None:
    gate = world.path / "gate"
    model = world.model("a", gate=str(gate), memory_bytes=777)
    with world.residency.enqueue(model, SETTINGS) as ticket:
        await until(lambda: ticket.status().load_fraction == 0.5)
        loading = world.status(model)
        assert loading is not None
        assert loading.state is RunnerState.LOADING
        assert loading.memory_bytes == 1000  # the estimate
        assert loading.queued == 1
        gate.touch()
        assert await ticket.wait(20)
        ready = world.status(model)
        assert ready is not None
        assert (ready.state, ready.memory_bytes, ready.device) == (RunnerState.READY, 777, "cpu")
        assert ready.expires_at is None
        assert ready.pid == ticket.runner.pid
        assert ready.load_duration is not None
    idle = world.status(model)
    assert idle is not None
    assert idle.expires_at is not None


async def test_measured_facts_are_used_by_the_next_load(world: World) -> None:
    model = world.model("a", journal=world.journal(), memory_bytes=4321)
    await world.ask(model, "x")
    await world.residency.unload(model.name, force=False)
    await world.ask(model, "x")
    assert world.loads() == ["1024 0", "1024 3"]  # the thread count that the first one measured
    assert (
        json.loads(next(v for (kind, _), v in world.memory.facts.items() if kind == "memory"))["weights_bytes"] == 4321
    )


async def test_a_draft_is_in_the_runners_view_and_in_its_memory(world: World, tmp_path: Path) -> None:
    shards = (tmp_path / "blob-b", tmp_path / "blob-a")
    for shard in shards:
        shard.write_bytes(b"draft")
    world.memory.measured = False
    gate = tmp_path / "gate"
    data = TinyModel().to_bytes()
    tiny = read_header(io.BytesIO(data), len(data))
    needed = []
    for name, draft in (("plain", ()), ("drafting", shards)):
        model = world.model(name, gate=str(gate), journal=world.journal())
        model = replace(model, header=tiny, draft=draft, draft_header=tiny if draft else None)
        with world.residency.enqueue(model, SETTINGS) as ticket:
            await until(lambda ticket=ticket: ticket.status().load_fraction == 0.5)  # type: ignore[misc]
            status = world.status(model)
            assert status is not None
            needed.append(status.memory_bytes)
            gate.touch()
            assert await ticket.wait(20)
        gate.unlink()
    assert needed[1] - needed[0] == estimate(tiny, num_ctx=256, slots=1, drafts=True).total_bytes
    assert [line.split()[2:] for line in world.loads()] == [
        [],
        ["draft-00001-of-00002.gguf", "draft-00002-of-00002.gguf"],
    ]


async def test_adapters_are_in_the_runners_view_and_in_its_memory(world: World, tmp_path: Path) -> None:
    adapters = tuple(AdapterFile(name, tmp_path / name, 0.5, 1000) for name in ("b", "a"))
    for adapter in adapters:
        adapter.path.write_bytes(b"adapter")
    world.memory.measured = False
    gate = tmp_path / "gate"
    data = TinyModel().to_bytes()
    tiny = read_header(io.BytesIO(data), len(data))
    needed = []
    for name, some in (("plain", ()), ("adapted", adapters)):
        model = replace(world.model(name, gate=str(gate)), header=tiny, adapters=some)
        with world.residency.enqueue(model, SETTINGS) as ticket:
            await until(lambda ticket=ticket: ticket.status().load_fraction == 0.5)  # type: ignore[misc]
            status = world.status(model)
            assert status is not None
            needed.append(status.memory_bytes)
            gate.touch()
            assert await ticket.wait(20)
        gate.unlink()
    assert needed[1] - needed[0] == 2000


async def test_client_that_hangs_up_during_a_load_does_not_waste_it(world: World) -> None:
    gate = world.path / "gate"
    model = world.model("a", gate=str(gate), journal=world.journal())
    waiting = asyncio.create_task(world.ask(model, "x"))
    await until(lambda: len(world.loads()) == 1)
    await cancel(waiting)
    gate.touch()
    await until(lambda: world.state(model) is RunnerState.READY)
    assert await world.ask(model, "y") == "y "
    assert len(world.loads()) == 1


async def test_explicit_load_reports_progress_and_is_not_undone(world: World) -> None:
    gate = world.path / "gate"
    model = replace(world.model("a", gate=str(gate), journal=world.journal()), header=header(context_length=1024))
    async with contextlib.aclosing(world.residency.load(model, {})) as events:
        async for event in events:
            assert isinstance(event, Waiting)
            if event.load_fraction == 0.5:
                break
    gate.touch()
    await until(lambda: world.state(model) is RunnerState.READY)
    (status,) = [event async for event in world.residency.load(model, {"num_ctx": 64})]
    assert isinstance(status, RunnerStatus)
    assert status.state is RunnerState.READY
    assert [line.split()[0] for line in world.loads()] == ["1024"]  # what the model was trained with, not 4096


async def test_explicit_load_checks_its_parameters(world: World) -> None:
    with pytest.raises(InvalidRequest, match="num_ctx"):
        [event async for event in world.residency.load(world.model("a"), {"num_ctx": 1})]


# Settings


async def test_smaller_context_reuses_and_larger_reloads_once(world: World) -> None:
    model = world.model("a", journal=world.journal())
    await world.ask(model, "x", LoadSettings(num_ctx=1024))
    await world.ask(model, "x", LoadSettings(num_ctx=512, num_batch=64, num_thread=2))
    assert len(world.loads()) == 1
    sizes = [2048, 4096, 1500]
    await asyncio.gather(*(world.ask(model, "x", LoadSettings(num_ctx=n)) for n in sizes))
    assert [line.split()[0] for line in world.loads()] == ["1024", "4096"]


async def test_what_a_load_took_is_logged_beside_the_estimate(world: World) -> None:
    data = TinyModel().to_bytes()
    tiny = read_header(io.BytesIO(data), len(data))
    model = replace(world.model("a", memory_bytes=4321), header=tiny)
    with capture_logs() as logs:
        await world.ask(model, "x", SETTINGS)
    (told,) = [entry for entry in logs if entry["event"] == "memory_measured"]
    expected = estimate(tiny, num_ctx=SETTINGS.num_ctx, slots=LIMITS.slots)
    assert told["model"] == model.name
    assert told["weights_bytes"] == 4321
    assert told["estimated_weights_bytes"] == expected.weights_bytes
    assert told["estimated_kv_bytes"] == expected.kv_bytes
    assert told["estimated_compute_bytes"] == expected.compute_bytes
    status = world.status(model)
    assert status is not None
    assert status.estimated_bytes == expected.total_bytes


async def test_more_exact_keys_and_values_serve_and_less_exact_ones_reload_once(world: World) -> None:
    model = world.model("a", journal=world.journal())
    await world.ask(model, "x", LoadSettings(num_ctx=1024, kv_type="q4_0"))
    kinds = ["q8_0", "f16", "q4_0"]
    await asyncio.gather(*(world.ask(model, "x", LoadSettings(num_ctx=512, kv_type=kind)) for kind in kinds))
    await world.ask(model, "x", LoadSettings(num_ctx=512, kv_type="q8_0"))
    assert world.loads() == ["1024 0 q4_0", "512 3"]


async def test_reload_waits_for_running_answers_and_others_queue_behind_it(world: World) -> None:
    model = world.model("a", journal=world.journal())
    gate = world.path / "gate"
    running = await world.holding(model, f"gate {gate}")
    larger = asyncio.create_task(world.ask(model, "larger", LoadSettings(num_ctx=4096)))
    await until(lambda: world.state(model) is RunnerState.DRAINING)
    small = asyncio.create_task(world.ask(model, "small"))
    await asyncio.sleep(0)
    assert not larger.done()
    assert not small.done()
    gate.touch()
    assert await running == "x"
    assert await larger == "larger "
    assert await small == "small "
    assert len(world.loads()) == 2


async def test_reload_is_called_off_when_its_client_leaves(world: World) -> None:
    model = world.model("a", journal=world.journal())
    running = await world.holding(model)
    larger = asyncio.create_task(world.ask(model, "larger", LoadSettings(num_ctx=4096)))
    await until(lambda: world.state(model) is RunnerState.DRAINING)
    small = asyncio.create_task(world.ask(model, "small"))
    await asyncio.sleep(0)
    await cancel(larger)
    assert await small == "small "
    assert world.state(model) is RunnerState.READY
    assert len(world.loads()) == 1
    await cancel(running)


async def test_wait_for_a_reload_has_a_deadline_and_those_behind_it_do_not_pay(world: World) -> None:
    world.limits = Limits(max_queue=100, slots=2, wait_s=0.2, drain_s=20)
    model = world.model("a")
    running = await world.holding(model)
    larger = asyncio.create_task(world.ask(model, "larger", LoadSettings(num_ctx=4096)))
    await until(lambda: world.state(model) is RunnerState.DRAINING)
    assert await world.ask(model, "small") == "small "
    with pytest.raises(RunnerStartTimeout):
        await larger
    await cancel(running)


async def test_engine_that_gives_less_context_is_not_reloaded_for_ever(world: World) -> None:
    """A model trained with 512 tokens that answers "512" to a request for 1024 has answered the request."""
    model = world.model("a", num_ctx_max=512, journal=world.journal())
    await world.ask(model, "x")
    await world.ask(model, "x")
    assert len(world.loads()) == 1
    status = world.status(model)
    assert status is not None
    assert status.context_length == 512


async def test_request_behind_a_reload_is_not_forgotten_when_its_client_leaves_at_once(world: World) -> None:
    """The one in front left before the actor had looked: nobody admitted the one behind, who waited for ever."""
    model = world.model("a")
    await world.ask(model, "x")
    larger = world.residency.enqueue(model, LoadSettings(num_ctx=4096))
    with world.residency.enqueue(model, SETTINGS) as behind:
        larger.close()
        assert await behind.wait(5)


async def test_context_that_does_not_fit_fails_only_those_who_asked_for_it(world: World) -> None:
    """A reload serves the largest context of all who wait; when that did not fit, everyone who waited was refused."""
    model = world.model("a", journal=world.journal())
    await world.ask(model, "x")
    world.memory.needs("ctx=4096", 1 << 40)
    running = await world.holding(model)
    larger = asyncio.create_task(world.ask(model, "larger", LoadSettings(num_ctx=4096)))
    small = asyncio.create_task(world.ask(model, "small"))
    with pytest.raises(DeviceMemoryShort):
        await larger
    assert await small == "small "
    assert not running.done()
    await cancel(running)
    # The same when no runner is there that could serve some of them.
    await world.residency.unload(model.name, force=True)
    larger = asyncio.create_task(world.ask(model, "larger", LoadSettings(num_ctx=4096)))
    small = asyncio.create_task(world.ask(model, "small"))
    with pytest.raises(DeviceMemoryShort):
        await larger
    assert await small == "small "


async def test_context_beyond_what_the_model_was_trained_with_is_no_reason_to_reload(world: World) -> None:
    """No runner makes a larger one: the reload ended with the same context, and memory was planned for the larger."""
    model = world.model("a", journal=world.journal())
    await world.ask(model, "x", LoadSettings(num_ctx=4096))
    await world.ask(model, "x", LoadSettings(num_ctx=1 << 20))
    assert world.loads() == ["4096 0"]


# Queues


async def test_queue_is_bounded_and_leaving_frees_the_place(world: World) -> None:
    """A client that is gone must free its place (llama-swap OnCancel, Ollama's leaked handlers)."""
    world.limits = Limits(max_queue=2, slots=2, wait_s=20, drain_s=20)
    model = world.model("a")
    running = [await world.holding(model) for _ in range(2)]
    queued = [asyncio.create_task(world.ask(model, "hold", caller=f"uid:{number}")) for number in range(2)]
    await until(lambda: (s := world.status(model)) is not None and s.queued == 2)
    with pytest.raises(QueueFull):
        await world.ask(model, "one too many")
    await cancel(queued[0])
    await until(lambda: (s := world.status(model)) is not None and s.queued == 1)
    queued.append(asyncio.create_task(world.ask(model, "hold")))
    await until(lambda: (s := world.status(model)) is not None and s.queued == 2)
    for task in running + queued[1:]:
        await cancel(task)
    await until(lambda: (s := world.status(model)) is not None and s.slots_busy == s.queued == 0)


async def test_calls_without_a_reply_count_as_well(world: World) -> None:
    """Two thousand embedding calls must not pile up in a runner whose queue of answers is empty."""
    world.limits = Limits(max_queue=4, slots=2, wait_s=20, drain_s=20)
    model = world.model("a")
    await world.ask(model, "warm")

    async def embed(caller: str) -> None:
        with world.residency.enqueue(model, SETTINGS, caller=caller) as ticket:
            assert await ticket.wait(30)
            await ticket.runner.call(frames.DaemonFrame(embed=frames.Embed(inputs=["hold"], caller=caller)))

    calls = [asyncio.create_task(embed("uid:1")) for _ in range(3)]
    await until(lambda: (refusal := refused(world, model, "uid:1")) is not None and "of your" in refusal)
    assert refused(world, model, "uid:2") is None
    calls.append(asyncio.create_task(embed("uid:2")))
    await until(lambda: refused(world, model, "uid:2") is not None)
    for call in calls:
        await cancel(call)
    assert refused(world, model, "uid:1") is None


def refused(world: World, model: Model, caller: str) -> str | None:
    """Return why a request of *caller* would get no place now, or None."""
    try:
        world.residency.enqueue(model, SETTINGS, caller=caller).close()
    except QueueFull as error:
        return error.message
    return None


async def test_each_of_many_waiters_gets_its_turn(world: World) -> None:
    """llama.cpp #28443: two waiters, one freed slot, one starves."""
    model = world.model("a")
    running = [await world.holding(model) for _ in range(2)]
    waiters = [asyncio.create_task(world.ask(model, f"n{n}")) for n in range(20)]
    await until(lambda: (s := world.status(model)) is not None and s.queued == 20)
    await cancel(running[0])
    assert await asyncio.gather(*waiters) == [f"n{n} " for n in range(20)]
    await cancel(running[1])


async def test_place_in_the_queue_is_known_while_loading(world: World) -> None:
    gate = world.path / "gate"
    model = world.model("a", gate=str(gate))
    with world.residency.enqueue(model, SETTINGS) as first, world.residency.enqueue(model, SETTINGS) as second:
        assert (first.status().queue_position, second.status().queue_position) == (0, 1)
        first.close()
        assert second.status().queue_position == 0
        gate.touch()
        assert await second.wait(20)


# Keep-alive


async def test_unloads_after_idle(world: World) -> None:
    world.keep_alive = timedelta(milliseconds=50)
    model = world.model("a")
    await world.ask(model, "x")
    await until(lambda: world.status(model) is None)
    assert world.released == [model.manifest_digest]
    assert world.residency.resident_manifests() == set()


async def test_idle_timer_never_hits_a_request(world: World) -> None:
    """llama-swap #946: the timer unloads while a request is being handed to the runner."""
    model = world.model("a", journal=world.journal())
    for round_ in range(30):
        pause_s = round_ % 5 / 1000
        assert await world.ask(model, "x", keep_alive=timedelta(milliseconds=2)) == "x "
        await asyncio.sleep(pause_s)
    assert len(world.loads()) > 1


async def test_keep_alive_zero_unloads_at_once_but_not_under_others(world: World) -> None:
    model = world.model("a")
    running = await world.holding(model)
    assert await world.ask(model, "x", keep_alive=timedelta(0)) == "x "
    assert world.state(model) is RunnerState.READY
    await cancel(running)
    await until(lambda: world.status(model) is None)


async def test_latest_explicit_keep_alive_wins_over_defaults(world: World) -> None:
    world.keep_alive = timedelta(milliseconds=20)
    model = world.model("a")
    await world.ask(model, "x", keep_alive=FOR_EVER)
    await world.ask(model, "x")
    status = world.status(model)
    assert status is not None
    assert status.keep_forever
    assert status.expires_at is None
    await world.ask(model, "x", keep_alive=timedelta(milliseconds=10))
    await until(lambda: world.status(model) is None)
    await world.ask(model, "x", keep_alive=timedelta(hours=1))
    await world.residency.unload(model.name, force=False)
    await world.ask(model, "x")
    await until(lambda: world.status(model) is None)  # an unload ends what was asked for


# Memory


async def test_evicts_the_least_recently_used_idle_model_only(world: World) -> None:
    world.free_bytes = 3000
    a, b, c, d = (world.model(name) for name in "abcd")
    busy = await world.holding(a)
    await world.ask(b, "x")
    await world.ask(c, "x")
    await world.ask(b, "x")
    assert await world.ask(d, "x") == "x "
    assert world.state(c) is None
    assert world.state(a) is world.state(b) is world.state(d) is RunnerState.READY
    assert not busy.done()
    await cancel(busy)


async def test_waits_for_busy_models_instead_of_evicting(world: World) -> None:
    """LM Studio #1796: eviction killed a running generation."""
    world.free_bytes = 1000
    a, b = world.model("a"), world.model("b")
    gate = world.path / "gate"
    busy = await world.holding(a, f"gate {gate}")
    other = asyncio.create_task(world.ask(b, "y"))
    await until(lambda: (s := world.status(b)) is not None and "`a:latest`" in s.reason)
    gate.touch()
    assert await busy == "x"
    assert await other == "y "
    assert world.state(a) is None


async def test_what_was_loaded_for_a_request_is_not_evicted_before_it_is_served(world: World) -> None:
    """llama.cpp #28698 A: a model was evicted for another one after its load, before its first request arrived."""
    world.free_bytes = 1000
    models = [world.model(name, journal=world.journal()) for name in "abc"]
    texts = await asyncio.gather(*(world.ask(model, model.name) for model in models))
    assert texts == [f"{model.name} " for model in models]
    assert len(world.loads()) == 3, "no load was for nothing"


async def test_explicit_load_evicts_like_any_other(world: World) -> None:
    """LM Studio #2051: an explicit load bypassed eviction and ran out of memory."""
    world.free_bytes = 1000
    a, b = world.model("a"), world.model("b")
    await world.ask(a, "x")
    assert [event async for event in world.residency.load(b, {})]
    assert world.state(a) is None


async def test_models_kept_for_ever_are_not_evicted(world: World) -> None:
    world.free_bytes = 1000
    a, b = world.model("a"), world.model("b")
    await world.ask(a, "x", keep_alive=FOR_EVER)
    with pytest.raises(DeviceMemoryShort) as caught:
        await world.ask(b, "y")
    assert caught.value.metadata["needed_bytes"] == "1000"
    assert caught.value.metadata["free_bytes"] == "0"
    assert world.state(a) is RunnerState.READY


async def test_what_can_never_fit_is_refused_at_once(world: World) -> None:
    world.free_bytes = 999
    idle = world.model("idle", memory_bytes=1)
    world.memory.unknown_bytes = 1
    await world.ask(idle, "x")
    world.memory.unknown_bytes = 1000
    with pytest.raises(DeviceMemoryShort):
        await world.ask(world.model("big"), "y")
    assert world.state(idle) is RunnerState.READY


async def test_wait_for_memory_has_a_deadline_and_can_be_left(world: World) -> None:
    world.limits = Limits(max_queue=100, slots=2, wait_s=0.3, drain_s=20)
    world.free_bytes = 1000
    a, b = world.model("a"), world.model("b")
    busy = await world.holding(a)
    with pytest.raises(DeviceMemoryShort):
        await world.ask(b, "y")
    leaving = asyncio.create_task(world.ask(b, "y"))
    await until(lambda: (s := world.status(b)) is not None and "`a:latest`" in s.reason)
    await cancel(leaving)
    await until(lambda: world.status(b) is None)
    assert not busy.done()
    await cancel(busy)


async def test_two_loads_at_once_do_not_get_the_same_bytes(world: World) -> None:
    world.free_bytes = 1500
    gate = world.path / "gate"
    a, b = world.model("a", gate=str(gate)), world.model("b", journal=world.journal())
    first = asyncio.create_task(world.ask(a, "x"))
    await until(lambda: (s := world.status(a)) is not None and s.memory_bytes == 1000)
    second = asyncio.create_task(world.ask(b, "y"))
    await until(lambda: (s := world.status(b)) is not None and "`a:latest`" in s.reason)
    assert world.loads() == []
    gate.touch()
    assert list(await asyncio.gather(first, second)) == ["x ", "y "]


async def test_out_of_memory_evicts_everyone_idle_and_tries_once_more(world: World) -> None:
    freed = world.path / "freed"
    idle, big = world.model("idle"), world.model("big", oom_until=str(freed), journal=world.journal())
    world.residency.on_released = lambda digest: freed.touch() if digest == idle.manifest_digest else None
    await world.ask(idle, "x")
    assert await world.ask(big, "y") == "y "
    assert world.state(idle) is None
    assert len(world.loads()) == 2


async def test_out_of_memory_twice_is_an_error_with_numbers(world: World) -> None:
    idle, big = world.model("idle"), world.model("big", load="oom", journal=world.journal())
    busy = world.model("busy")
    running = await world.holding(busy)
    await world.ask(idle, "x")
    with pytest.raises(DeviceMemoryShort):
        await world.ask(big, "y", LoadSettings(num_ctx=64))
    assert len(world.loads()) == 2
    assert world.state(busy) is RunnerState.READY
    await cancel(running)


async def test_a_model_that_does_not_fit_is_told_so_without_a_pause(world: World) -> None:
    world.limits = Limits(max_queue=100, slots=2, wait_s=20, drain_s=20, backoff_s=15)
    world.free_bytes = 10
    for _ in range(3):
        with pytest.raises(DeviceMemoryShort):
            await world.ask(world.model("a"), "x")


async def test_accelerator_first_then_main_memory(world: World) -> None:
    world.gpu_free_bytes = 1000
    a, b = world.model("a", gpu=True), world.model("b", gpu=True)
    await world.ask(a, "x", keep_alive=FOR_EVER)
    world.gpu_free_bytes = 0
    await world.ask(b, "x")
    assert [s.device for s in map(world.status, (a, b)) if s is not None] == ["gpu", "cpu"]
    with pytest.raises(DeviceMemoryShort):
        await world.ask(world.model("c", gpu=True), "x", LoadSettings(num_ctx=64, num_gpu=99))
    d = world.model("d", gpu=True)
    await world.ask(d, "x", LoadSettings(num_ctx=64, num_gpu=0))
    assert (status := world.status(d)) is not None
    assert status.device == "cpu"


# Failures


async def test_crash_reaches_only_the_requests_it_hit(world: World) -> None:
    a, b = world.model("a"), world.model("b")
    bystander = await world.holding(b)
    same_runner = await world.holding(a)
    with pytest.raises(RunnerCrashed, match="SIGABRT"):
        await world.ask(a, "abort")
    with pytest.raises(RunnerCrashed, match="SIGABRT"):
        await same_runner
    assert not bystander.done()
    await until(lambda: world.state(a) is RunnerState.FAILED)
    status = world.status(a)
    assert status is not None
    assert "SIGABRT" in status.reason
    assert a.manifest_digest in world.released
    assert await world.ask(a, "again") == "again "
    await cancel(bystander)


async def test_request_after_an_idle_runner_died_is_served(world: World) -> None:
    """llama.cpp #28698 B: a request joins a dying child."""
    model = world.model("a")
    await world.ask(model, "x")
    world.signal(model, signal.SIGKILL)
    await until(lambda: world.state(model) is RunnerState.FAILED)
    assert await world.ask(model, "y") == "y "


async def test_a_runner_that_dies_while_its_load_waits_fails_nobody(world: World) -> None:
    """Its death was noticed when the memory came, and told to requests that were made long after it."""
    world.free_bytes = 1000
    a, b = world.model("a"), world.model("b")
    gate = world.path / "gate"
    busy = await world.holding(a, f"gate {gate}")
    other = asyncio.create_task(world.ask(b, "y"))
    await until(lambda: (s := world.status(b)) is not None and "`a:latest`" in s.reason)
    (waiting,) = world.unlisted()
    world.kill(waiting)
    await until(lambda: not world.is_alive(waiting))
    gate.touch()
    assert await busy == "x"
    assert await other == "y "


async def test_hung_runner_is_ended_and_told_apart(world: World) -> None:
    world.timings = RunnerTimings(ping_interval_s=0.05, hang_s=0.5, term_s=0.3)
    model = world.model("a")
    with pytest.raises(RunnerHung):
        await world.ask(model, "freeze")
    assert await world.ask(model, "x") == "x "


async def test_failing_loads_do_not_storm(world: World) -> None:
    """LocalAI's cool-down: a model whose runner dies while it loads is not respawned for each request."""
    world.limits = Limits(max_queue=100, slots=2, wait_s=20, drain_s=20, backoff_s=0.2)
    model = world.model("a", load="abort", journal=world.journal())
    for attempt in (1, 2, 3):
        outcomes = await asyncio.gather(*(world.ask(model, "x") for _ in range(20)), return_exceptions=True)
        assert all(isinstance(outcome, RunnerCrashed) for outcome in outcomes)
        assert len(world.loads()) == attempt
    with world.residency.enqueue(model, SETTINGS) as ticket:
        await until(lambda: "after a failure" in ticket.status().detail)


async def test_refused_model_is_refused_again_without_a_process(world: World) -> None:
    world.limits = Limits(max_queue=100, slots=2, wait_s=20, drain_s=20, backoff_s=15)
    model = world.model("a", load="incompatible", journal=world.journal())
    for _ in range(3):
        with pytest.raises(ModelIncompatible):
            await world.ask(model, "x")
    assert len(world.loads()) == 1


async def test_failed_runner_is_listed_for_a_while(world: World) -> None:
    world.limits = Limits(max_queue=100, slots=2, wait_s=20, drain_s=20, failed_s=0.1)
    model = world.model("a", load="abort")
    with pytest.raises(RunnerCrashed):
        await world.ask(model, "x")
    assert world.state(model) is RunnerState.FAILED
    assert world.residency.resident_manifests() == set()
    with pytest.raises(ModelNotFound):
        await world.residency.unload(model.name, force=True)
    await until(lambda: world.status(model) is None)


# Unloading


async def test_unload_lets_running_answers_finish(world: World) -> None:
    model = world.model("a", journal=world.journal())
    gate = world.path / "gate"
    running = await world.holding(model, f"gate {gate}")
    assert await world.residency.unload(model.name, force=False) == 1
    leaving = world.status(model)
    assert leaving is not None
    assert leaving.reason == "1 running answer finishes first"
    assert world.state(model) is RunnerState.DRAINING
    newcomer = asyncio.create_task(world.ask(model, "new"))
    gate.touch()
    assert await running == "x"
    assert await newcomer == "new "
    assert len(world.loads()) == 2


async def test_unload_by_force_cuts_answers_with_their_own_error(world: World) -> None:
    model, other = world.model("a"), world.model("b")
    bystander = await world.holding(other)
    running = [await world.holding(model) for _ in range(2)]
    queued = asyncio.create_task(world.ask(model, "x"))
    await until(lambda: (s := world.status(model)) is not None and s.queued == 1)
    assert await world.residency.unload(str(model.manifest_digest), force=True) == 3
    for task in [*running, queued]:
        with pytest.raises(Unloaded):
            await task
    assert world.status(model) is None
    assert not bystander.done()
    await cancel(bystander)


async def test_unload_of_an_idle_model_is_done_when_it_returns(world: World) -> None:
    model = world.model("a")
    await world.ask(model, "x")
    assert await world.residency.unload("A:Latest", force=False) == 0
    assert world.residency.resident_manifests() == set()
    with pytest.raises(ModelNotFound, match="is not in memory"):
        await world.residency.unload(model.name, force=False)


@pytest.mark.parametrize("force", [False, True])
async def test_nothing_of_a_runner_survives_an_unload(world: World, force: bool) -> None:
    """Docker model runner #7958: the process of an unloaded model went on, and kept its memory."""
    model = world.model("a", child=True)
    await world.ask(model, "x")
    status = world.status(model)
    assert status is not None
    assert world.is_alive(status.pid)
    family = [process.pid for process in psutil.Process().children(recursive=True)]
    assert len(family) == (0 if world.host is not None else 2)
    await world.residency.unload(model.name, force=force)
    assert not world.is_alive(status.pid)
    await until(lambda: not any(psutil.pid_exists(pid) for pid in family))


async def test_a_new_version_of_a_name_takes_the_place_of_the_old_one(world: World) -> None:
    """After a second `lm create v` both versions stayed in memory as `v:latest`, and `lm stop v` met the old one."""
    old = world.model("v")
    new = replace(world.model("w"), name=old.name, digest=Digest.of(b"new"))
    gate = world.path / "gate"
    running = await world.holding(old, f"gate {gate}")
    assert await world.ask(new, "x") == "x "
    assert world.state(old) is RunnerState.DRAINING
    gate.touch()
    assert await running == "x"
    await until(lambda: world.status(old) is None)
    assert await world.residency.unload(old.name, force=False) == 0
    assert world.residency.resident_manifests() == set()


async def test_an_old_version_that_has_another_name_stays_under_that(world: World) -> None:
    old = world.model("v")
    copy = replace(old, name="a-copy:latest", digest=old.manifest_digest)
    new = replace(world.model("w"), name=old.name, digest=Digest.of(b"new"))
    for model in (old, copy, new):
        await world.ask(model, "x")
    assert {status.name: status.digest for status in world.residency.list()} == {
        "a-copy:latest": old.manifest_digest,
        "v:latest": new.manifest_digest,
    }


@pytest.mark.parametrize("force", [False, True])
async def test_unload_of_a_stuck_idle_runner_does_not_wait_for_the_drain(world: World, force: bool) -> None:
    """A runner that was stopped with SIGSTOP answered nobody and obeyed nobody.

    `lm stop --force` and `lm rm` once gave it all of `runtime.drain_timeout`, which is for answers, before they used
    force; and an eviction gave up before that was over.
    """
    world.limits = replace(world.limits, drain_s=3600)
    model = world.model("a", obeys_drain=False, obeys_term=False)
    await world.ask(model, "x")
    async with asyncio.timeout(30):
        await world.residency.unload(model.name, force=force)
    assert world.status(model) is None


async def test_unload_during_a_load(world: World) -> None:
    gate = world.path / "gate"
    model = world.model("a", gate=str(gate), journal=world.journal())
    with world.residency.enqueue(model, SETTINGS) as ticket:
        await until(lambda: len(world.loads()) == 1)
        assert await world.residency.unload(model.name, force=False) == 0
        gate.touch()
        assert await collect(await world.submit(ticket, "served first")) == "served first "
    await until(lambda: world.status(model) is None)
    gate.unlink()
    waiting = asyncio.create_task(world.ask(model, "x"))
    await until(lambda: len(world.loads()) == 2)
    await world.residency.unload(model.name, force=True)
    with pytest.raises(Unloaded):
        await waiting
    await until(lambda: world.status(model) is None)


# Shutdown


async def test_shutdown_drains_running_and_refuses_waiting(world: World) -> None:
    gate = world.path / "gate"
    a, b = world.model("a"), world.model("b", gate=str(world.path / "never"))
    running = await world.holding(a, f"gate {gate}")
    loading = asyncio.create_task(world.ask(b, "x"))
    await until(lambda: world.status(b) is not None)
    stopping = asyncio.create_task(world.residency.stop())
    with pytest.raises(Draining):
        await loading
    with pytest.raises(Draining):
        await world.ask(a, "new")
    assert not stopping.done()
    gate.touch()
    assert await running == "x"
    await stopping
    assert world.residency.list() == []


async def test_shutdown_cuts_what_outlasts_the_deadline(world: World) -> None:
    world.limits = Limits(max_queue=100, slots=2, wait_s=20, drain_s=0.1)
    model = world.model("a")
    running = await world.holding(model)
    await world.residency.stop()
    with pytest.raises(Draining):
        await running


async def test_views_of_a_killed_daemon_are_removed(world: World) -> None:
    stale = world.path / "run" / "runners" / "view-old"
    stale.mkdir(parents=True)
    await world.residency.start()
    assert not stale.exists()
