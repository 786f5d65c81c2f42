"""Answers from end to end below the wire, and the services on top, with fake runners."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from datetime import timedelta

import grpc.aio
import pytest

from lmd.daemon.answer_events import Delta, Done, Started
from lmd.daemon.answer_options import AnswerOptions, Priority
from lmd.daemon.errors import QueueFull, RunnerCrashed
from lmd.daemon.residency.requests import BATCH, INTERACTIVE
from lmd.daemon.residency.values import RunnerState, Waiting
from lmd.registry.errors import CapabilityMissing, InvalidRequest, ModelNotFound
from lmd.registry.lm_config import Message
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2, runtime_service_pb2
from tests.support.inference_bench import Bench, Connection, text_of
from tests.support.leaks import until


async def test_answer_has_waiting_then_text_then_one_done(bench: Bench) -> None:
    bench.model()
    events = await bench.generate("once upon a time", parameters={"seed": 5})
    kinds = [type(event) for event in events]
    assert kinds[0] is Waiting
    assert kinds[-1] is Done
    assert kinds.count(Done) == 1
    assert Waiting not in kinds[kinds.index(Delta) :]
    assert text_of(events) == "once upon a time "
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.prompt_tokens, done.generated_tokens, done.seed) == ("stop", 4, 4, 5)
    assert done.total_ns >= done.load_ns > 0
    again = await bench.generate("x")
    assert [type(event) for event in again] == [Delta, Done]
    last = again[-1]
    assert isinstance(last, Done)
    assert last.load_ns == 0


@pytest.mark.parametrize(
    ("system", "raw", "expected"),
    [
        (None, False, "be brief\n\nhi"),
        ("", False, "hi"),
        ("be long", False, "be long\n\nhi"),
        (None, True, "hi"),
    ],
)
async def test_prompt_without_a_template(bench: Bench, system: str | None, raw: bool, expected: str) -> None:
    bench.model(system="be brief")
    events = await bench.generate("hi", system=system, raw=raw)
    assert text_of(events).split() == expected.split()


async def test_prompt_with_a_template_is_one_user_turn(bench: Bench) -> None:
    model = bench.model(system="terse", chat=True, echo_chat=True)
    bench.catalog.add(replace(model, messages=(Message("user", "1"), Message("assistant", "2"))))
    assert text_of(await bench.generate("hi")).split() == ["system=terse", "user=1", "assistant=2", "user=hi"]
    assert text_of(await bench.generate("hi", raw=True)) == "hi "
    chat = await bench.chat(("system", "verbose"), ("user", "hi"))
    assert text_of(chat).split() == ["system=verbose", "user=1", "assistant=2", "user=hi"]


async def test_size_of_the_prompt_is_told_before_the_answer(bench: Bench) -> None:
    bench.model(chat=True)
    told: list[Started] = []
    turns = [Message("user", "hold on please")]
    events = bench.inference.chat(model="m", messages=turns, on_started=told.append)
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                break
            assert told == []
    assert told == [Started(prompt_tokens=3, cached_tokens=0)]


async def test_requests_that_make_no_sense(bench: Bench) -> None:
    bench.model(chat=True)
    with pytest.raises(InvalidRequest, match="system"):
        await bench.generate("x", raw=True, system="y")
    with pytest.raises(InvalidRequest, match="message"):
        await bench.chat()
    with pytest.raises(InvalidRequest, match="robot"):
        await bench.chat(("robot", "x"))
    with pytest.raises(InvalidRequest, match="top_p"):
        await bench.generate("x", parameters={"top_p": 7})
    with pytest.raises(ModelNotFound):
        [event async for event in bench.inference.generate(model="other", prompt="x")]
    assert bench.world.residency.list() == []  # nobody loaded a model for them


async def test_model_without_a_template_does_not_chat(bench: Bench) -> None:
    bench.model()
    with pytest.raises(CapabilityMissing) as caught:
        await bench.chat(("user", "x"))
    assert caught.value.metadata["capability"] == "chat"


async def test_closing_the_stream_cancels_in_the_runner(bench: Bench) -> None:
    model = bench.model()
    async with contextlib.aclosing(bench.inference.generate(model="m", prompt="hold")) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
    await until(lambda: (s := bench.world.status(model)) is not None and s.slots_busy == 0)


async def test_slow_consumer_gets_merged_text(bench: Bench) -> None:
    bench.model()
    deltas = []
    async for event in bench.inference.generate(model="m", prompt="count 20000"):
        if isinstance(event, Delta):
            deltas.append(event)
            await asyncio.sleep(0.01)
    assert "".join(delta.text for delta in deltas) == "x" * 20000
    assert deltas[-1].generated_tokens == 20000
    assert len(deltas) < 2000


async def test_place_in_the_queue_is_told_as_it_changes(bench: Bench) -> None:
    bench.model()
    holding = [asyncio.create_task(bench.generate("hold")) for _ in range(2)]
    await until(lambda: any(s.slots_busy == 2 for s in bench.world.residency.list()))
    first = asyncio.create_task(bench.generate("hold"))
    await until(lambda: any(s.queued == 1 for s in bench.world.residency.list()))
    async with contextlib.aclosing(bench.inference.generate(model="m", prompt="x")) as events:
        assert await anext(events) == Waiting(1)
        first.cancel()
        assert await anext(events) == Waiting(0)
        holding[0].cancel()
        assert text_of([event async for event in events]) == "x "
    holding[1].cancel()
    await asyncio.gather(first, *holding, return_exceptions=True)


async def test_request_that_had_no_slot_survives_a_crash_of_others(bench: Bench) -> None:
    """Two run, one of them kills the runner; a third only waited for a slot, and is served by the next runner."""
    bench.model()
    gate = bench.world.path / "gate"
    holding = asyncio.create_task(bench.generate("hold"))
    await until(lambda: any(s.slots_busy == 1 for s in bench.world.residency.list()))
    poison = asyncio.create_task(bench.generate(f"abort-at {gate}"))
    await until(lambda: any(s.slots_busy == 2 for s in bench.world.residency.list()))
    queued = asyncio.create_task(bench.generate("survives"))
    await until(lambda: any(s.queued == 1 for s in bench.world.residency.list()))
    gate.touch()
    for task in (holding, poison):
        with pytest.raises(RunnerCrashed):
            await task
    assert text_of(await queued) == "survives "


async def test_request_that_crashes_every_runner_ends(bench: Bench) -> None:
    bench.model(crash_on_submit=True, journal=bench.world.journal())
    with pytest.raises(RunnerCrashed):
        await bench.generate("x")
    assert len(bench.world.loads()) == 2


# The services


async def test_generate_over_the_wire(bench: Bench, connection: Connection) -> None:
    bench.model()
    call = connection.inference.Generate(
        pb.GenerateRequest(
            model="m", prompt="once upon", parameters=model_pb2.Parameters(temperature=0, stop=["x"], seed=3)
        )
    )
    events = [response async for response in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "waiting"
    assert events[0].waiting.HasField("load")
    assert kinds[-1] == "done"
    assert "".join(event.delta.text for event in events) == "once upon "
    done = events[-1].done
    assert done.finish_reason == pb.AnswerDone.FINISH_REASON_STOP
    assert done.seed == 3
    assert done.total_duration.ToNanoseconds() > done.load_duration.ToNanoseconds() > 0


async def test_chat_over_the_wire_with_an_explicit_keep_alive(bench: Bench, connection: Connection) -> None:
    model = bench.model(chat=True)
    request = pb.ChatRequest(model="m", messages=[model_pb2.Message(role="user", content="hi")])
    request.keep_alive.FromTimedelta(timedelta(seconds=-1))
    events = [response async for response in connection.inference.Chat(request)]
    assert "".join(event.delta.text for event in events) == "hi "
    (runner,) = (await connection.runtime.ListRunners(runtime_service_pb2.ListRunnersRequest())).runners
    assert runner.name == model.name
    assert runner.keep_forever
    assert not runner.HasField("expire_time")
    assert runner.state == runtime_service_pb2.Runner.STATE_READY
    assert runner.load_duration.ToNanoseconds() > 0


async def test_hanging_up_frees_the_slot(bench: Bench, connection: Connection) -> None:
    model = bench.model()
    call = connection.inference.Generate(pb.GenerateRequest(model="m", prompt="hold"))
    async for response in call:
        if response.HasField("delta"):
            break
    call.cancel()
    await until(lambda: (s := bench.world.status(model)) is not None and s.slots_busy == 0)


async def test_load_and_unload_over_the_wire(bench: Bench, connection: Connection) -> None:
    model = bench.model()
    request = runtime_service_pb2.LoadModelRequest(name="m", parameters=model_pb2.Parameters(num_ctx=64))
    events = [event async for event in connection.runtime.LoadModel(request)]
    assert [event.WhichOneof("event") for event in events[-1:]] == ["runner"]
    assert events[-1].runner.context_length == 64
    del bench.catalog.models[model.name]  # removed from the store, still resident
    unload = runtime_service_pb2.UnloadModelRequest(name="m")
    done = await connection.runtime.UnloadModel(unload)
    assert (done.name, done.running_answers) == (model.name, 0)
    assert bench.world.status(model) is None


async def test_unload_by_another_name_of_the_same_model(bench: Bench, connection: Connection) -> None:
    model = bench.model()
    await bench.generate("x")
    bench.catalog.add(replace(model, name="copy:latest", digest=model.manifest_digest))
    done = await connection.runtime.UnloadModel(runtime_service_pb2.UnloadModelRequest(name="copy"))
    assert done.name == "copy:latest"
    assert bench.world.status(model) is None


async def test_unload_of_a_model_that_is_not_resident_names_it(bench: Bench, connection: Connection) -> None:
    """It once named the digest, which nobody typed, and read all weights to find it."""
    bench.model()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await connection.runtime.UnloadModel(runtime_service_pb2.UnloadModelRequest(name="m"))
    assert "model `m:latest` is not in memory" in str(caught.value.details())


async def test_full_queue_refuses(bench: Bench) -> None:
    model = bench.model(gate=str(bench.world.path / "gate"))
    callers = ("uid:1", "uid:2")
    waiting = [
        asyncio.create_task(bench.generate("x", caller=callers[number % 2]))
        for number in range(bench.world.limits.max_queue)
    ]
    await until(lambda: (s := bench.world.status(model)) is not None and s.queued == len(waiting))
    with pytest.raises(QueueFull, match="too many requests"):
        await bench.generate("x", caller="uid:3")
    (bench.world.path / "gate").touch()
    assert {text_of(events) for events in await asyncio.gather(*waiting)} == {"x "}
    assert bench.world.state(model) is RunnerState.READY


async def test_what_only_batches_use_counts_as_a_batch_for_memory(bench: Bench) -> None:
    """The priority of a request ordered only the slots of its runner: for memory all were alike."""
    model = bench.model()
    batch = AnswerOptions(priority=Priority.BATCH)
    usage = bench.world.residency._usage
    assert text_of(await bench.generate("word", options=batch)) == "word "
    assert usage(str(model.manifest_digest)).priority == BATCH
    assert text_of(await bench.generate("word")) == "word "
    assert usage(str(model.manifest_digest)).priority == INTERACTIVE
    await bench.generate("word", options=batch)
    assert usage(str(model.manifest_digest)).priority == INTERACTIVE
