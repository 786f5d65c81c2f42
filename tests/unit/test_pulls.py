from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from lmd.daemon.errors import Draining, QueueFull
from lmd.daemon.pull_job import State, Watcher
from lmd.daemon.pulls import Pulls
from lmd.registry.errors import InvalidRequest, PullCancelled, SourceUnavailable
from lmd.registry.pull import PullEvent, PullState
from lmd.registry.ref import parse_ref
from tests.support.fake_puller import DEADLINE_S, FakePuller, progress

LLAMA = parse_ref("llama3")


@pytest.fixture
def puller() -> FakePuller:
    return FakePuller()


@pytest.fixture
async def pulls(puller: FakePuller) -> AsyncIterator[Pulls]:
    pulls = Pulls(puller)
    yield pulls
    await pulls.stop()


async def drained(watcher: Watcher) -> list[PullEvent]:
    async with asyncio.timeout(DEADLINE_S):
        return [event async for event in watcher]


async def seen(watcher: Watcher, wanted: Callable[[PullEvent], bool]) -> PullEvent:
    async with asyncio.timeout(DEADLINE_S):
        async for event in watcher:
            if wanted(event):
                return event
    raise AssertionError("the pull ended before the event")


def at(completed_bytes: int) -> Callable[[PullEvent], bool]:
    return lambda event: event.completed_bytes == completed_bytes


async def test_a_watcher_sees_the_progress_and_then_the_model(pulls: Pulls, puller: FakePuller) -> None:
    async with pulls.attach(LLAMA, token="t") as watcher:
        assert (watcher.name, watcher.joined) == ("llama3:latest", False)
        transfer = await puller.next_transfer()
        assert transfer.token == "t"
        transfer.report(progress("a.gguf", 10))
        await seen(watcher, at(10))
        transfer.report(progress("a.gguf", 100, state=PullState.DONE))
        transfer.succeed()
        events = await drained(watcher)
        assert [(e.state, e.completed_bytes) for e in events] == [(PullState.DONE, 100)]
        assert watcher.result().name == "llama3:latest"


async def test_the_state_of_the_whole_is_forgotten_once_there_are_files(pulls: Pulls, puller: FakePuller) -> None:
    async with pulls.attach(LLAMA) as first:
        assert (await anext(first)).state is PullState.RESOLVING
        transfer = await puller.next_transfer()
        transfer.report(progress("a.gguf", 1))
        await seen(first, at(1))
        async with pulls.attach(LLAMA) as second:
            assert (await anext(second)).filename == "a.gguf"


async def test_a_second_caller_joins_and_sees_where_it_stands_at_once(pulls: Pulls, puller: FakePuller) -> None:
    async with pulls.attach(LLAMA, token="secret of the first") as first:
        transfer = await puller.next_transfer()
        transfer.report(progress("a.gguf", 100, state=PullState.DONE), progress("b.gguf", 60))
        await seen(first, at(60))
        async with pulls.attach(parse_ref("LLAMA3:latest"), token="another") as second:
            assert second.joined
            assert second.pull_id == first.pull_id
            now = [await anext(second), await anext(second)]
            assert [(e.filename, e.completed_bytes) for e in now] == [("a.gguf", 100), ("b.gguf", 60)]
            transfer.succeed()
            await drained(first)
            await drained(second)
            assert first.result() == second.result()
    assert puller.started == 1
    assert transfer.token == "secret of the first"


async def test_pulls_of_other_models_and_other_digests_are_other_pulls(pulls: Pulls, puller: FakePuller) -> None:
    digest = "sha256:" + "a" * 64
    refs = [
        parse_ref(text)
        for text in (
            "llama3",
            "llama3:8b",
            f"llama3@{digest}",
            "https://127.0.0.1/x.gguf?rev=1",
            "https://127.0.0.1/x.gguf?rev=2",
        )
    ]
    async with AsyncExitStack() as stack:
        watchers = [await stack.enter_async_context(pulls.attach(ref)) for ref in refs]
        assert not any(watcher.joined for watcher in watchers)
        assert len({watcher.pull_id for watcher in watchers}) == len(refs)


async def test_a_url_is_listed_without_its_query(pulls: Pulls) -> None:
    ref = parse_ref("https://127.0.0.1/x.gguf?signature=secret")
    async with pulls.attach(ref, text="https://127.0.0.1/x.gguf?signature=secret"):
        (status,) = pulls.statuses()
    assert "secret" not in repr(status)


async def test_the_last_watcher_that_leaves_stops_the_pull(pulls: Pulls, puller: FakePuller) -> None:
    async with pulls.attach(LLAMA):
        transfer = await puller.next_transfer()
        async with pulls.attach(LLAMA):
            pass
        assert not transfer.cancelled.is_set()
    assert transfer.cancelled.is_set()
    await asyncio.to_thread(transfer.done.wait, DEADLINE_S)


async def test_the_one_who_started_may_leave_first(pulls: Pulls, puller: FakePuller) -> None:
    async with AsyncExitStack() as others:
        async with pulls.attach(LLAMA):
            transfer = await puller.next_transfer()
            second = await others.enter_async_context(pulls.attach(LLAMA))
        transfer.report(progress("a.gguf", 7))
        await seen(second, at(7))
        assert pulls.statuses()[0].watchers == 1
        transfer.succeed()
        await drained(second)
        assert second.result().name == "llama3:latest"


async def test_a_watcher_that_is_cancelled_while_it_waits_leaves(pulls: Pulls, puller: FakePuller) -> None:
    async def watch() -> None:
        async with pulls.attach(LLAMA) as watcher:
            await drained(watcher)

    task = asyncio.create_task(watch())
    transfer = await puller.next_transfer()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transfer.cancelled.is_set()


@pytest.mark.parametrize("detached_by", ["first", "second"])
async def test_a_detached_pull_goes_on_alone(pulls: Pulls, puller: FakePuller, detached_by: str) -> None:
    async with pulls.attach(LLAMA, detach=detached_by == "first"):
        transfer = await puller.next_transfer()
        async with pulls.attach(LLAMA, detach=detached_by == "second"):
            pass
    assert not transfer.cancelled.is_set()
    (status,) = pulls.statuses()
    assert (status.state, status.detached, status.watchers) == (State.ACTIVE, True, 0)
    async with pulls.attach(LLAMA) as late:
        transfer.succeed()
        await drained(late)
        assert late.result().name == "llama3:latest"


async def test_who_comes_while_a_pull_stops_gets_a_new_one(pulls: Pulls, puller: FakePuller) -> None:
    async with pulls.attach(LLAMA) as first:
        old = await puller.next_transfer()
    assert old.cancelled.is_set()
    async with pulls.attach(LLAMA) as second:
        assert old.done.is_set(), "two transfers of one model at a time"
        assert not second.joined
        assert second.pull_id != first.pull_id
        new = await puller.next_transfer()
        new.succeed()
        await drained(second)
        assert second.result().name == "llama3:latest"


@pytest.mark.parametrize("by", ["id", "name"])
async def test_cancel_ends_it_for_all_watchers(pulls: Pulls, puller: FakePuller, by: str) -> None:
    async with pulls.attach(LLAMA, detach=True) as first, pulls.attach(LLAMA) as second:
        await puller.next_transfer()
        await pulls.cancel(first.pull_id if by == "id" else "llama3")
        for watcher in (first, second):
            await drained(watcher)
            with pytest.raises(PullCancelled):
                watcher.result()
    (status,) = pulls.statuses()
    assert (status.state, status.error_message, status.watchers) == (State.CANCELLED, "", 0)
    await pulls.cancel(first.pull_id)  # once more changes nothing


async def test_cancel_of_an_unknown_or_finished_pull_is_refused(pulls: Pulls, puller: FakePuller) -> None:
    async with pulls.attach(LLAMA) as watcher:
        (await puller.next_transfer()).succeed()
        await drained(watcher)
    for name in (watcher.pull_id, "llama3", "nobody", "..", ""):
        with pytest.raises(InvalidRequest, match="is under way"):
            await pulls.cancel(name)


async def test_an_error_reaches_every_watcher_and_the_list(pulls: Pulls, puller: FakePuller) -> None:
    async with pulls.attach(LLAMA, detach=True) as first, pulls.attach(LLAMA) as second:
        transfer = await puller.next_transfer()
        transfer.fail(SourceUnavailable("cannot reach the source", ref="llama3"))
        for watcher in (first, second):
            await drained(watcher)
            with pytest.raises(SourceUnavailable, match="cannot reach"):
                watcher.result()
    (status,) = pulls.statuses()
    assert (status.state, status.error_message) == (State.FAILED, "cannot reach the source")


async def test_a_defect_reaches_the_watcher_but_its_words_not_the_list(pulls: Pulls, puller: FakePuller) -> None:
    async with pulls.attach(LLAMA) as watcher:
        (await puller.next_transfer()).fail(ZeroDivisionError("internals"))
        await drained(watcher)
        with pytest.raises(ZeroDivisionError):
            watcher.result()
    assert pulls.statuses()[0].state is State.FAILED
    assert "internals" not in pulls.statuses()[0].error_message


async def test_a_watcher_that_does_not_read_neither_blocks_nor_piles_up(pulls: Pulls, puller: FakePuller) -> None:
    async with pulls.attach(LLAMA) as sleeper, pulls.attach(LLAMA) as awake:
        transfer = await puller.next_transfer()
        transfer.report(*(progress(f"{i % 3}.gguf", i, 10_000) for i in range(1, 9001)))
        transfer.succeed()
        await drained(awake)
        assert awake.result().name == "llama3:latest"
        late = await drained(sleeper)
        assert {e.filename: e.completed_bytes for e in late} == {"0.gguf": 9000, "1.gguf": 8998, "2.gguf": 8999}
        assert len(late) == 3


async def test_progress_is_thinned_but_changes_of_state_come_at_once(pulls: Pulls, puller: FakePuller) -> None:
    loop = asyncio.get_running_loop()
    async with pulls.attach(LLAMA) as watcher:
        transfer = await puller.next_transfer()
        began = loop.time()
        transfer.report(*(progress("a.gguf", i, 10_000) for i in range(1, 5001)))
        transfer.report(progress("a.gguf", 5000, 10_000, PullState.RETRYING))
        counted = 0
        async with asyncio.timeout(DEADLINE_S):
            async for event in watcher:
                counted += 1
                if event.state is PullState.RETRYING:
                    break
        assert counted <= 3 + (loop.time() - began) / 0.2
        transfer.succeed()
        await drained(watcher)


async def test_pulls_beyond_the_threads_wait_their_turn_and_can_be_stopped_there(puller: FakePuller) -> None:
    pulls = Pulls(puller, workers=1, max_pulls=3)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(pulls.attach(parse_ref("a")))
        running = await puller.next_transfer()
        waiting = await stack.enter_async_context(pulls.attach(parse_ref("b")))
        assert (await anext(waiting)).detail == "waiting for other pulls to end"
        third = await stack.enter_async_context(pulls.attach(parse_ref("c")))
        with pytest.raises(QueueFull):
            await stack.enter_async_context(pulls.attach(parse_ref("d")))
        async with asyncio.timeout(DEADLINE_S):
            await pulls.cancel("b")
        await drained(waiting)
        with pytest.raises(PullCancelled):
            waiting.result()
        running.succeed()
        (await puller.next_transfer()).succeed()
        await drained(third)
        assert third.result().name == "c:latest"
    await pulls.stop()


async def test_ended_pulls_are_listed_for_an_hour_oldest_first(puller: FakePuller) -> None:
    now = 0.0
    pulls = Pulls(puller, clock=lambda: now)
    for name in ("a", "b"):
        async with pulls.attach(parse_ref(name)) as watcher:
            transfer = await puller.next_transfer()
            transfer.report(progress("x.gguf", 100, state=PullState.DONE))
            transfer.succeed()
            await drained(watcher)
        now += 1800.0
    assert [(s.name, s.state, s.completed_bytes) for s in pulls.statuses()] == [
        ("a:latest", State.SUCCEEDED, 100),
        ("b:latest", State.SUCCEEDED, 100),
    ]
    now += 1.0
    assert [s.name for s in pulls.statuses()] == ["b:latest"]
    await pulls.stop()


async def test_stop_ends_detached_pulls_and_refuses_new_ones(puller: FakePuller) -> None:
    pulls = Pulls(puller)
    async with pulls.attach(LLAMA, detach=True) as watcher:
        transfer = await puller.next_transfer()
        async with asyncio.timeout(DEADLINE_S):
            await pulls.stop()
        assert transfer.done.is_set()
        await drained(watcher)
        with pytest.raises(PullCancelled):
            watcher.result()
    with pytest.raises(Draining):
        async with pulls.attach(LLAMA):
            pass
