"""What an answer is asked to be, its deadline, its place in the queue, and clients that do not read; fake runners."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lmd.daemon.adapter_scales import AdapterFile
from lmd.daemon.answer_events import ChoiceDone, Delta, Done, Event
from lmd.daemon.answer_options import AnswerOptions, ContextPolicy, Format, FormatKind, Priority
from lmd.daemon.errors import DeadlineExceeded, QueueFull, Unloaded
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import CapabilityMissing, InvalidRequest
from lmd.registry.lm_config import Message
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2, runtime_service_pb2
from tests.support.inference_bench import Bench, Connection, text_of
from tests.support.leaks import until
from tests.support.residents import Model

SOON = AnswerOptions(timeout_s=0.3)


def slots_busy(bench: Bench, model: Model) -> int:
    status = bench.world.status(model)
    return status.slots_busy if status is not None else 0


def queued(bench: Bench, model: Model) -> int:
    status = bench.world.status(model)
    return status.queued if status is not None else 0


def received(events: list[Event]) -> dict[str, Any]:
    """Return the request that the runner got, from the answer to "request"."""
    request: dict[str, Any] = json.loads(text_of(events))
    return request


async def hold(bench: Bench, model: Model, **options: Any) -> asyncio.Task[list[Event]]:
    """Take a slot until the task is cancelled."""
    before = slots_busy(bench, model)
    task = asyncio.create_task(bench.generate("hold", **options))
    await until(lambda: slots_busy(bench, model) > before)
    return task


async def let_go(*tasks: asyncio.Task[list[Event]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def fill_queue(bench: Bench, model: Model, caller: str) -> list[asyncio.Task[list[Event]]]:
    """Let as many requests of *caller* wait as may."""
    count = bench.world.limits.max_queue_of_caller
    waiting = [asyncio.create_task(bench.generate("x", caller=caller)) for _ in range(count)]
    await until(lambda: queued(bench, model) == count)
    return waiting


# Options


async def test_options_and_the_caller_reach_the_runner(bench: Bench) -> None:
    bench.model()
    options = AnswerOptions(
        format=Format(FormatKind.REGEX, "[ab]+"),
        logit_bias={3: -math.inf},
        stop_tokens=(9,),
        priority=Priority.BATCH,
        context_policy=ContextPolicy.TRUNCATE,
        timeout_s=60,
    )
    request = received(await bench.generate("request", options=options, caller="uid:2", parameters={"seed": 4}))
    assert request["format"] == {"regex": "[ab]+"}
    assert request["sampling"]["logitBias"] == {"3": "-Infinity"}
    assert request["sampling"]["stopTokens"] == [9]
    assert request["sampling"]["seed"] == 4
    assert request["priority"] == "PRIORITY_BATCH"
    assert request["contextPolicy"] == "CONTEXT_POLICY_TRUNCATE"
    assert request["caller"] == request["cacheScope"] == "uid:2"
    assert request["weight"] == 2.5
    assert 0 < int(request["timeoutMs"]) < 60_000  # the load has taken some of it
    plain = received(await bench.generate("request", caller="uid:3"))
    assert plain["weight"] == 1
    assert plain["caller"] == "uid:3"
    assert not {"timeoutMs", "format", "choices", "topLogprobs"} & set(plain)


async def test_scales_of_adapters_reach_the_runner_by_number(bench: Bench, tmp_path: Path) -> None:
    adapters = [AdapterFile(f"{name}.gguf", tmp_path / name, 0.5, 5) for name in ("pirate", "poet")]
    for adapter in adapters:
        adapter.path.write_bytes(b"bytes")
    bench.catalog.add(replace(bench.model(), adapters=tuple(adapters)))
    options = AnswerOptions(adapters={"poet": 0.25})
    request = received(await bench.generate("request", options=options))
    assert request["adapters"] == [{"adapter": 1, "scale": 0.25}]
    assert "adapters" not in received(await bench.generate("request"))
    with pytest.raises(InvalidRequest, match="no adapter called `parrot`"):
        await bench.generate("request", options=AnswerOptions(adapters={"parrot": 1.0}))


async def test_several_choices_with_log_probabilities(bench: Bench) -> None:
    bench.model()
    events = await bench.generate("a bc", options=AnswerOptions(choices=2, top_logprobs=2))
    for choice in (0, 1):
        deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
        assert "".join(delta.text for delta in deltas) == "a bc "
        tokens = [token for delta in deltas for token in delta.logprobs]
        assert [token.token for token in tokens] == [b"a ", b"bc "]
        assert [len(token.top) for token in tokens] == [2, 2]
        assert tokens[0].top[1].token == b"\xff"
    done = events[-1]
    assert isinstance(done, Done)
    assert done.choices == (ChoiceDone("stop", 2, ""), ChoiceDone("stop", 2, ""))
    assert done.generated_tokens == 4


async def test_options_out_of_range_load_nothing(bench: Bench) -> None:
    bench.model()
    with pytest.raises(InvalidRequest, match="choices"):
        await bench.generate("x", options=AnswerOptions(choices=17))
    assert bench.world.residency.list() == []


@pytest.mark.parametrize(
    ("kind", "error", "metadata"),
    [
        ("invalid format", InvalidRequest, {"field": "format"}),
        ("capability shift", CapabilityMissing, {"name": "m:latest", "capability": "shift"}),
    ],
)
async def test_what_only_the_runner_can_refuse(
    bench: Bench, kind: str, error: type[Exception], metadata: dict[str, str]
) -> None:
    bench.model()
    with pytest.raises(error) as caught:
        await bench.generate(f"fail {kind}")
    assert getattr(caught.value, "metadata") == metadata  # noqa: B009 - not every Exception has it


async def test_runner_learns_what_the_manifest_puts_before_every_chat(bench: Bench) -> None:
    model = replace(bench.model(system="terse", chat=True), template="{{ messages }}")
    bench.catalog.add(replace(model, messages=(Message("user", "1"), Message("assistant", "2"))))
    load = received(await bench.generate("load", raw=True))
    assert [(m["role"], m["content"]) for m in load["manifestChat"]["messages"]] == [
        ("system", "terse"),
        ("user", "1"),
        ("assistant", "2"),
    ]


@pytest.mark.parametrize(("system", "template"), [("terse", None), (None, "{{ messages }}")])
async def test_manifest_without_a_template_or_a_beginning_puts_nothing_there(
    bench: Bench, system: str | None, template: str | None
) -> None:
    bench.catalog.add(replace(bench.model(system=system), template=template))
    assert "manifestChat" not in received(await bench.generate("load", raw=True))


# Deadlines


async def test_deadline_while_the_model_loads(bench: Bench) -> None:
    model = bench.model(gate=str(bench.world.path / "gate"))
    with pytest.raises(DeadlineExceeded) as caught:
        await bench.generate("x", options=SOON)
    assert caught.value.metadata == {"timeout_s": "0.3"}
    assert queued(bench, model) == 0


@pytest.mark.parametrize("obeys_deadlines", [True, False])
async def test_deadline_while_waiting_for_a_slot(bench: Bench, obeys_deadlines: bool) -> None:
    model = bench.model(obeys_deadlines=obeys_deadlines)
    holding = [await hold(bench, model) for _ in range(2)]
    with pytest.raises(DeadlineExceeded):
        await bench.generate("x", options=SOON)
    await until(lambda: queued(bench, model) == 0)
    await let_go(*holding)


@pytest.mark.parametrize("obeys_deadlines", [True, False])
async def test_deadline_while_generating_keeps_what_came_and_frees_the_slot(
    bench: Bench, obeys_deadlines: bool
) -> None:
    model = bench.model(obeys_deadlines=obeys_deadlines)
    await bench.generate("warm")
    stream = bench.inference.generate(model="m", prompt="hold", options=SOON)
    delta = await anext(event async for event in stream if isinstance(event, Delta))
    assert delta.text == "x"
    with pytest.raises(DeadlineExceeded):
        await anext(stream)
    await until(lambda: slots_busy(bench, model) == 0)


async def test_the_runner_may_be_the_first_to_say_that_time_is_up(bench: Bench) -> None:
    bench.model()
    with pytest.raises(DeadlineExceeded, match="within 60 s"):
        await bench.generate("fail deadline", options=AnswerOptions(timeout_s=60))


async def test_the_shorter_of_both_deadlines_counts(bench: Bench) -> None:
    bench.model()
    long = AnswerOptions(timeout_s=600)
    request = received(await bench.generate("request", options=long, time_left_s=30))
    assert int(request["timeoutMs"]) < 30_000
    request = received(await bench.generate("request", options=AnswerOptions(timeout_s=30), time_left_s=600))
    assert int(request["timeoutMs"]) < 30_000
    with pytest.raises(DeadlineExceeded):
        await bench.generate("x", options=long, time_left_s=0)


# Queues


async def test_place_in_the_queue_is_the_runners(bench: Bench) -> None:
    """A batch request that came first lets an interactive one pass, and both are told so."""
    model = bench.model()
    holding = [await hold(bench, model) for _ in range(2)]
    patient = bench.inference.generate(model="m", prompt="patient", options=AnswerOptions(priority=Priority.BATCH))
    urgent = bench.inference.generate(model="m", prompt="urgent")
    async with contextlib.aclosing(patient), contextlib.aclosing(urgent):
        assert await anext(patient) == Waiting(0)
        assert await anext(urgent) == Waiting(0)
        assert await anext(patient) == Waiting(1)
        await let_go(holding[0])
        assert text_of([event async for event in urgent]) == "urgent "
        assert text_of([event async for event in patient]) == "patient "
    await let_go(holding[1])


async def test_one_caller_cannot_fill_the_queue(bench: Bench) -> None:
    """200 requests of one user once locked out everybody else."""
    model = bench.model()
    holding = [await hold(bench, model, caller="uid:1") for _ in range(2)]
    mine = await fill_queue(bench, model, "uid:1")
    with pytest.raises(QueueFull, match="too many of your requests wait already") as caught:
        await bench.generate("x", caller="uid:1")
    assert caught.value.metadata == {"limit": "75"}
    others = asyncio.create_task(bench.generate("y", caller="uid:2"))
    await until(lambda: queued(bench, model) == len(mine) + 1)
    await let_go(*holding)
    assert text_of(await others) == "y "
    assert {text_of(events) for events in await asyncio.gather(*mine)} == {"x "}


async def test_one_caller_cannot_fill_the_queue_of_a_load(bench: Bench) -> None:
    gate = bench.world.path / "gate"
    model = bench.model(gate=str(gate))
    mine = await fill_queue(bench, model, "uid:1")
    with pytest.raises(QueueFull):
        await bench.generate("x", caller="uid:1")
    others = asyncio.create_task(bench.generate("y", caller="uid:2"))
    await until(lambda: queued(bench, model) == len(mine) + 1)
    gate.touch()
    assert text_of(await others) == "y "
    await asyncio.gather(*mine)


@pytest.mark.parametrize(("answer_s", "retry_after_s"), [(24.0, 12.0), (0.01, 1.0), (7200.0, 60.0)])
async def test_retry_is_told_from_how_long_answers_take(bench: Bench, answer_s: float, retry_after_s: float) -> None:
    model = bench.model(answer_s=answer_s)
    await bench.generate("x")
    holding = [await hold(bench, model) for _ in range(2)]
    waiting = await fill_queue(bench, model, "uid:1")
    with pytest.raises(QueueFull) as caught:
        await bench.generate("x", caller="uid:1")
    assert caught.value.retry_after_s == retry_after_s
    await let_go(*holding, *waiting)


# Clients that do not read


async def test_model_can_leave_when_the_answer_is_done_and_the_client_has_not_read_it(bench: Bench) -> None:
    """Such a client once kept the model in memory for as long as it pleased."""
    model = bench.model()
    async with contextlib.aclosing(bench.inference.generate(model="m", prompt="some words")) as events:
        first = await anext(event async for event in events if isinstance(event, Delta))
        await until(lambda: slots_busy(bench, model) == 0)
        assert await bench.world.residency.unload(model.name, force=False) == 0
        assert bench.world.status(model) is None
        rest = [event async for event in events]
    assert isinstance(rest[-1], Done)
    assert first.text + text_of(rest) == "some words "


async def test_unload_by_force_cuts_an_answer_that_goes_on(bench: Bench) -> None:
    model = bench.model()
    holding = await hold(bench, model)
    assert await bench.world.residency.unload(model.name, force=True) == 1
    with pytest.raises(Unloaded):
        await holding


# Over the wire


def errors_of(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, list[Any]]:
    """Return the ErrorInfo of a failed call, and its other details."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, others = error_details_pb2.ErrorInfo(), []
    for detail in status.details:
        for kind in (error_details_pb2.RetryInfo, error_details_pb2.BadRequest):
            if detail.Is(kind.DESCRIPTOR):
                message = kind()
                detail.Unpack(message)
                others.append(message)
        detail.Unpack(info)
    return info, others


async def test_options_over_the_wire(bench: Bench, connection: Connection) -> None:
    bench.model(chat=True)
    options = pb.AnswerOptions(choices=2, top_logprobs=1)
    chat = pb.ChatRequest(model="m", messages=[model_pb2.Message(role="user", content="a bc")], options=options)
    responses = [response async for response in connection.inference.Chat(chat)]
    deltas = [response.delta for response in responses if response.HasField("delta")]
    assert {delta.choice for delta in deltas} == {0, 1}
    tokens = [token for delta in deltas if delta.choice == 1 for token in delta.logprobs]
    assert [(token.id, token.token, token.logprob) for token in tokens] == [(2, b"a ", -0.5), (3, b"bc ", -0.5)]
    assert [top.token for top in tokens[0].top] == [b"a "]
    choices = responses[-1].done.choices
    assert [(c.finish_reason, c.generated_tokens) for c in choices] == [(pb.AnswerDone.FINISH_REASON_STOP, 2)] * 2


async def test_wrong_options_over_the_wire_name_the_field(bench: Bench, connection: Connection) -> None:
    bench.model()
    request = pb.GenerateRequest(model="m", prompt="x", options=pb.AnswerOptions(logit_bias={5: math.nan}))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in connection.inference.Generate(request)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    info, [bad_request] = errors_of(caught.value)
    assert (info.reason, info.metadata["field"]) == ("INVALID_ARGUMENT", "logit_bias")
    assert "token 5 must be from -100 to 100" in bad_request.field_violations[0].description


async def test_time_out_over_the_wire(bench: Bench, connection: Connection) -> None:
    bench.model()
    request = pb.GenerateRequest(model="m", prompt="hold")
    request.options.timeout.FromMilliseconds(400)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in connection.inference.Generate(request)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    info, _ = errors_of(caught.value)
    assert (info.reason, info.metadata["timeout_s"]) == ("DEADLINE_EXCEEDED", "0.4")


async def test_the_calls_own_deadline_reaches_the_runner(bench: Bench, connection: Connection) -> None:
    bench.model()
    call = connection.inference.Generate(pb.GenerateRequest(model="m", prompt="request"), timeout=50)
    request = json.loads("".join([response.delta.text async for response in call]))
    # gRPC rounds a deadline up to a few digits on the wire, so a quick server sees a little more than was asked.
    assert 0 < int(request["timeoutMs"]) <= 51_000


async def test_full_queue_over_the_wire_says_when_to_come_back(bench: Bench, connection: Connection) -> None:
    model = bench.model(answer_s=24.0)
    await bench.generate("x")
    holding = [await hold(bench, model) for _ in range(2)]
    waiting = await fill_queue(bench, model, "uid:1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in connection.inference.Generate(pb.GenerateRequest(model="m", prompt="x"))]
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, [retry] = errors_of(caught.value)
    assert info.reason == "QUEUE_FULL"
    assert retry.retry_delay.seconds == 12
    await let_go(*holding, *waiting)


async def test_what_the_engine_did_is_listed(bench: Bench, connection: Connection) -> None:
    model = bench.model()
    await bench.generate("four words in all")
    await until(lambda: (s := bench.world.status(model)) is not None and s.stats is not None and s.stats.kv_size > 0)
    await until(lambda: (s := bench.world.status(model)) is not None and bool(s.stats and s.stats.generated_tokens))
    (runner,) = (await connection.runtime.ListRunners(runtime_service_pb2.ListRunnersRequest())).runners
    assert (runner.stats.prompt_tokens, runner.stats.generated_tokens, runner.stats.kv_size) == (4, 4, 4096)


async def unread_answer(
    bench: Bench, connection: Connection, count: int
) -> tuple[int, AsyncIterator[pb.GenerateResponse]]:
    """Ask for *count* times 4 KiB and read nothing but the beginning until the answer is over.

    Return how much was read, and the rest.
    """
    model = bench.model()
    call = connection.inference.Generate(pb.GenerateRequest(model="m", prompt=f"count {count} 4096"))
    responses = call.__aiter__()
    while not (response := await anext(responses)).HasField("delta"):
        pass
    await until(lambda: slots_busy(bench, model) == 0)
    assert await bench.world.residency.unload(model.name, force=False) == 0  # nor does it hold the model
    return len(response.delta.text), responses


async def test_client_that_stops_reading_holds_no_slot(bench: Bench, connection: Connection) -> None:
    """The connection takes about 4 MiB of the answer; for the rest the daemon waits, and the runner does not."""
    count = 1500
    begun, rest = await unread_answer(bench, connection, count)
    responses = [response async for response in rest]
    assert responses[-1].HasField("done")
    assert begun + sum(len(response.delta.text) for response in responses) == count * 4096
    assert len(responses) < count - 1  # what came meanwhile was merged


async def test_client_that_reads_nothing_of_an_endless_answer_is_given_up(bench: Bench, connection: Connection) -> None:
    _, rest = await unread_answer(bench, connection, 100_000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in rest]
    info, _ = errors_of(caught.value)
    assert (info.reason, caught.value.code()) == ("CLIENT_STALLED", grpc.StatusCode.ABORTED)
