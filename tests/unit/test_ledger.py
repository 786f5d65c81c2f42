"""The ledger of memory, with drivers that are late and programs that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lmd.daemon.errors import DeviceMemoryShort, DeviceUnavailable
from lmd.daemon.residency import ledger as ledger_module
from lmd.daemon.residency.decisions import LEASE_PREFIX, Usage
from lmd.daemon.residency.ledger import Ledger
from lmd.daemon.residency.plans import Action, Ask, DeviceMemory, Held, Need, Plan
from tests.support.leaks import until

IDLE = Usage(busy=False, last_used=0, pinned=False, leaving=False)


class Machine:
    """A GPU whose free memory a test sets; evicted models leave when the test says so."""

    def __init__(self, free_bytes: int, device: str = "cuda0") -> None:
        self.free_bytes = free_bytes
        self.device = device
        self.usages: dict[str, Usage] = {}
        self.evicted: list[str] = []
        self.yielded: list[str] = []
        self.kept: list[str] = []
        self.waits: list[Plan] = []
        self.readings = 0
        self.ledger = Ledger(
            read_devices=self.read,
            reserve_bytes=0,
            usage=lambda key: self.usages.get(key, IDLE),
            evict=lambda key, reason: self.evicted.append(key),
            yield_turn=lambda key, reason: self.yielded.append(key),
            keep_turn=self.keep_turn,
        )

    def keep_turn(self, key: str) -> None:
        self.kept.append(key)
        self.ledger.keeps_turn(key)

    async def read(self) -> Sequence[DeviceMemory]:
        await asyncio.sleep(0)
        self.readings += 1
        return [DeviceMemory(self.device, 200, self.free_bytes)]

    async def admit(self, key: str, timeout_s: float = 20) -> str:
        ask = Ask.of_bytes(key, key, 100, self.device)
        placement = await self.ledger.admit(ask, timeout_s=timeout_s, on_wait=self.waits.append)
        return placement.device

    async def resident(self, key: str) -> None:
        await self.admit(key)
        self.free_bytes -= 100
        self.ledger.settle(key, [Held(self.device, 100)])

    async def until_waiting(self) -> None:
        await until(lambda: bool(self.waits))


@pytest.mark.parametrize("device", ["cuda0", "cpu"])
async def test_memory_of_a_dead_process_is_waited_for(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """llama.cpp #23668: the driver still shows the memory of the child that just died, and the next load fails."""
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    machine = Machine(100, device)
    await machine.resident("a")
    load = asyncio.create_task(machine.admit("b"))
    await machine.until_waiting()
    assert machine.evicted == ["a"]
    machine.ledger.release("a")
    seen = machine.readings
    await until(lambda: machine.readings >= seen + 3)
    assert not load.done()  # three late readings have neither refused it nor evicted more
    assert set(machine.evicted) == {"a"}
    machine.free_bytes = 100
    assert await load == device


async def test_what_the_driver_never_gives_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    monkeypatch.setattr(ledger_module, "GPU_SETTLE_S", 0.05)
    monkeypatch.setattr(ledger_module, "RELEASE_S", 0.05)
    machine = Machine(100)
    await machine.resident("a")
    machine.ledger.release("a")
    with pytest.raises(DeviceMemoryShort):
        await machine.admit("b")


async def test_memory_freed_for_one_load_is_not_taken_by_a_later_one() -> None:
    machine = Machine(100)
    await machine.resident("a")
    first = asyncio.create_task(machine.admit("first"))
    await machine.until_waiting()
    later = asyncio.create_task(machine.admit("later"))
    seen = machine.readings
    await until(lambda: machine.readings > seen)
    machine.free_bytes = 100
    machine.ledger.release("a")
    assert await first == "cuda0"
    assert not later.done()
    later.cancel()
    with pytest.raises(asyncio.CancelledError):
        await later


async def test_loads_at_the_same_moment_do_not_share_bytes() -> None:
    machine = Machine(150)
    machine.usages = {key: Usage(busy=True, last_used=0, pinned=False, leaving=False) for key in "ab"}
    tasks = [asyncio.create_task(machine.admit(key)) for key in "ab"]
    done, pending = await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
    assert len(done) == len(pending) == 1
    for task in pending:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_memory_that_a_resident_has_grown_into_is_not_counted_twice() -> None:
    machine = Machine(100)
    await machine.resident("a")
    # It holds 60 that the machine has shown since it was loaded, and may take 40 more.
    machine.ledger.settle("a", [Held("cuda0", 100, unseen_bytes=40)])
    machine.free_bytes = 130
    machine.usages["a"] = Usage(busy=True, last_used=0, pinned=False, leaving=False)
    with pytest.raises(DeviceMemoryShort):
        await machine.admit("b", timeout_s=0.05)
    machine.usages["a"] = Usage(busy=True, last_used=0, pinned=False, leaving=False, grown_bytes=40)
    assert await machine.admit("b") == "cuda0"


async def test_the_wait_ends_with_numbers() -> None:
    machine = Machine(100)
    await machine.resident("a")
    machine.usages["a"] = Usage(busy=True, last_used=0, pinned=False, leaving=False)
    with pytest.raises(DeviceMemoryShort) as caught:
        await machine.admit("b", timeout_s=0.05)
    assert caught.value.metadata["needed_bytes"] == "100"
    assert caught.value.metadata["free_bytes"] == "0"
    assert machine.evicted == []
    assert (machine.waits[0].action, machine.waits[0].others) == (Action.WAIT, ("a",))
    decided = machine.ledger.recent()[0].plan
    assert decided.action is Action.REFUSE
    assert decided.reason.startswith("gave up after 0.1 s: waits for memory that `a` holds")


BUSY = Usage(busy=True, last_used=0, pinned=False, leaving=False)


async def leave(task: asyncio.Task[str]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_busy_model_yields_when_somebody_has_waited_long_enough() -> None:
    """Ollama waits for busy models without end; llama-swap kills their answers."""
    machine = Machine(100)
    await machine.resident("a")
    # Its turn is half a second, and patience with it a tenth.
    machine.usages["a"] = replace(BUSY, loaded_at=asyncio.get_running_loop().time() - 60)
    load = asyncio.create_task(machine.admit("b"))
    await until(lambda: bool(machine.yielded))
    assert machine.yielded[0] == "a"
    assert machine.evicted == []
    assert [decision.plan.action for decision in machine.ledger.recent()][:2] == [Action.TURN, Action.WAIT]
    machine.free_bytes = 100
    machine.ledger.release("a")
    assert await load == "cuda0"


async def test_a_turn_that_nobody_wants_any_more_is_called_off() -> None:
    machine = Machine(100)
    await machine.resident("a")
    machine.usages["a"] = replace(BUSY, loaded_at=asyncio.get_running_loop().time() - 60)
    load = asyncio.create_task(machine.admit("b"))
    await until(lambda: bool(machine.yielded))
    await leave(load)
    assert machine.kept == ["a"]
    later = asyncio.create_task(machine.admit("c"))
    await until(lambda: bool(machine.ledger.waiting()))
    assert machine.ledger.waiting()[0].plan.action is Action.WAIT  # who comes now has patience again
    await leave(later)


async def test_memory_of_who_yields_is_not_taken_by_a_later_one() -> None:
    machine = Machine(100)
    await machine.resident("a")
    machine.usages["a"] = replace(BUSY, loaded_at=asyncio.get_running_loop().time() - 60)
    first = asyncio.create_task(machine.admit("first"))
    await until(lambda: bool(machine.yielded))
    later = asyncio.create_task(machine.admit("later"))
    await until(lambda: len(machine.ledger.waiting()) == 2)
    machine.free_bytes = 100
    machine.ledger.release("a")
    assert await first == "cuda0"
    assert not later.done()
    await leave(later)


async def test_the_higher_priority_is_served_first_and_then_who_came_first() -> None:
    machine = Machine(100)
    await machine.resident("a")
    machine.usages = dict.fromkeys(("a", "late", "early", "urgent"), BUSY)
    served: list[str] = []

    async def load(key: str, priority: int = 0) -> None:
        ask = Ask.of_bytes(key, key, 100, "cuda0", priority=priority)
        await machine.ledger.admit(ask, timeout_s=20, on_wait=machine.waits.append)
        served.append(key)
        machine.ledger.settle(key, [])
        machine.ledger.release(key)

    tasks = []
    for key, priority in (("early", 0), ("late", 0), ("urgent", 1)):
        tasks.append(asyncio.create_task(load(key, priority)))
        await until(lambda: len(machine.ledger.waiting()) == len(tasks))
    assert [decision.name for decision in machine.ledger.waiting()] == ["urgent", "early", "late"]
    machine.free_bytes = 100
    machine.ledger.release("a")
    await asyncio.gather(*tasks)
    assert served == ["urgent", "early", "late"]


async def test_what_waited_in_a_queue_counts() -> None:
    machine = Machine(100)
    await machine.resident("a")
    machine.usages["a"] = BUSY
    ask = replace(Ask.of_bytes("b", "b", 100, "cuda0"), waited_s=300)
    load = asyncio.create_task(machine.ledger.admit(ask, timeout_s=20, on_wait=machine.waits.append))
    await machine.until_waiting()
    assert machine.ledger.waiting()[0].waited_s >= 300
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load


async def test_decisions_are_told_once_each_with_names_and_reasons() -> None:
    machine = Machine(100)
    await machine.resident("a")
    machine.usages["a"] = BUSY
    load = asyncio.create_task(machine.admit("b"))
    await machine.until_waiting()
    seen = machine.readings
    await until(lambda: machine.readings >= seen + 2)
    (waiting,) = machine.ledger.waiting()
    assert (waiting.name, waiting.plan.action, waiting.others) == ("b", Action.WAIT, ("a",))
    assert waiting.plan.reason.startswith("waits for memory that `a` holds")
    assert [decision.name for decision in machine.ledger.recent()] == ["b", "a"]
    await leave(load)
    assert machine.ledger.waiting() == []


async def test_the_last_decisions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(200)
    for number in range(ledger_module.REMEMBERED + 5):
        await machine.admit(str(number))
        machine.ledger.settle(str(number), [])
        machine.ledger.release(str(number))
    kept = machine.ledger.recent()
    assert len(kept) == ledger_module.REMEMBERED
    assert kept[0].name == str(ledger_module.REMEMBERED + 4)


async def test_whoever_asks_is_told_when_the_machine_cannot_be_read() -> None:
    machine = Machine(100)

    async def fail() -> Sequence[DeviceMemory]:
        raise OSError("the driver is gone")

    machine.read = fail  # type: ignore[method-assign]
    machine.ledger = Ledger(
        read_devices=machine.read,
        reserve_bytes=0,
        usage=lambda key: IDLE,
        evict=lambda key, reason: None,
        yield_turn=lambda key, reason: None,
        keep_turn=lambda key: None,
    )
    with pytest.raises(OSError, match="driver"):
        await machine.admit("a")
    assert machine.ledger.waiting() == []


async def test_a_question_changes_nothing() -> None:
    machine = Machine(100)
    await machine.resident("a")
    asked = await machine.ledger.would(Ask.of_bytes("b", "b", 100, "cuda0"))
    assert (asked.action, asked.others) == (Action.EVICT, ("a",))
    assert machine.evicted == []
    assert [decision.name for decision in machine.ledger.recent()] == ["a"]
    assert machine.ledger.holding("b") is None


async def test_nobody_asks_twice() -> None:
    machine = Machine(200)
    await machine.admit("a")
    with pytest.raises(ValueError, match="has memory already"):
        await machine.admit("a")


async def test_what_a_load_takes_for_a_moment_refuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models that only wait for a third were refused when that was ready, by a reading of that very moment."""
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    machine = Machine(200)
    machine.usages["a"] = BUSY
    await machine.admit("a")
    machine.ledger.settle("a", [Held("cuda0", 100)])
    machine.free_bytes = -50
    load = asyncio.create_task(machine.admit("b"))
    await machine.until_waiting()
    machine.free_bytes = 100
    assert await load == "cuda0"
    assert Action.REFUSE not in [decision.plan.action for decision in machine.ledger.recent()]


async def test_what_never_fits_is_refused_when_loads_have_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    monkeypatch.setattr(ledger_module, "LOAD_SETTLE_S", 0.05)
    machine = Machine(200)
    machine.usages["a"] = BUSY
    await machine.admit("a")
    machine.ledger.settle("a", [Held("cuda0", 100)])
    machine.free_bytes = -50
    with pytest.raises(DeviceMemoryShort):
        await machine.admit("b")


async def test_what_loads_counts_twice_and_refuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it loads all of it counts as still to come, and a reading shows what it has taken already."""
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    machine = Machine(200)
    machine.usages["a"] = replace(BUSY, pinned=True)
    await machine.admit("a")
    machine.free_bytes = 100
    load = asyncio.create_task(machine.admit("b"))
    await machine.until_waiting()
    assert machine.waits[0].reason.startswith("waits until memory has settled: does not fit on cuda0: 100 B needed")
    assert {decision.plan.action for decision in machine.ledger.recent()} == {Action.LOAD, Action.WAIT}
    machine.ledger.settle("a", [Held("cuda0", 100)])
    assert await load == "cuda0"


async def test_what_does_not_fit_however_a_load_counts_is_refused_at_once() -> None:
    machine = Machine(200)
    machine.usages["a"] = replace(BUSY, pinned=True)
    await machine.admit("a")
    machine.free_bytes = 100
    with pytest.raises(DeviceMemoryShort):
        await machine.ledger.admit(Ask.of_bytes("b", "b", 101, "cuda0"), timeout_s=20, on_wait=machine.waits.append)
    assert machine.waits == []


def with_less() -> Ask:
    """Ask for a context of 4096 tokens, or for one of 3072 where no more fits."""
    needs = (Need.flat(100, num_ctx=4096), Need.flat(30, num_ctx=3072))
    return Ask("b", "b", needs, devices=("cuda0",))


async def loading(machine: Machine) -> None:
    """Let a model load that may take 100; it has taken 70, and a reading shows them."""
    machine.usages["a"] = replace(BUSY, pinned=True)
    await machine.admit("a")
    machine.free_bytes = 130


async def test_what_loads_counts_twice_and_makes_no_context_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that waited for another one's load got a context of 3072 tokens, with room for 4096 a moment later."""
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    machine = Machine(200)
    await loading(machine)
    load = asyncio.create_task(machine.ledger.admit(with_less(), timeout_s=20, on_wait=machine.waits.append))
    await until(lambda: load.done() or bool(machine.waits))
    assert machine.waits[0].reason == "waits until memory has settled: a context of 4096 tokens may fit then"
    machine.free_bytes = 100
    machine.ledger.settle("a", [Held("cuda0", 100)])
    assert (await load).num_ctx == 4096


async def test_a_smaller_context_it_is_when_loads_have_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    monkeypatch.setattr(ledger_module, "LOAD_SETTLE_S", 0.05)
    machine = Machine(200)
    await loading(machine)
    load = asyncio.create_task(machine.ledger.admit(with_less(), timeout_s=20, on_wait=machine.waits.append))
    await machine.until_waiting()
    machine.free_bytes = 50  # another program has taken the rest
    machine.ledger.settle("a", [Held("cuda0", 100)])
    assert (await load).num_ctx == 3072


async def test_a_smaller_context_is_better_than_a_wait_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load may take longer than anybody wants to wait for the larger one."""
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    machine = Machine(200)
    await loading(machine)
    placed = await machine.ledger.admit(with_less(), timeout_s=0.05, on_wait=machine.waits.append)
    assert placed.num_ctx == 3072
    assert machine.waits


async def test_a_smaller_context_that_no_settling_makes_larger_is_taken_at_once() -> None:
    machine = Machine(200)
    await loading(machine)
    ask = replace(with_less(), needs=(Need.flat(200, num_ctx=4096), Need.flat(0, num_ctx=3072)))
    machine.free_bytes = 110
    assert (await machine.ledger.admit(ask, timeout_s=20, on_wait=machine.waits.append)).num_ctx == 3072
    assert machine.waits == []


async def test_whether_it_would_be_refused_counts_what_it_holds_as_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A working model was unloaded for a reload that was refused then."""
    monkeypatch.setattr(ledger_module, "LOAD_SETTLE_S", 0)
    machine = Machine(150)
    await machine.resident("a")
    machine.usages["a"] = replace(BUSY, pinned=True, by_name=True)
    assert await machine.ledger.refusal(Ask.of_bytes("a", "a", 150, "cuda0")) is None
    refused = await machine.ledger.refusal(Ask.of_bytes("a", "a", 200, "cuda0"))
    assert refused is not None
    assert not refused.settling
    assert isinstance(refused.error, DeviceMemoryShort)
    assert (refused.error.metadata["needed_bytes"], refused.error.metadata["free_bytes"]) == ("200", "150")
    assert "lets it go" not in refused.error.hint  # it is pinned, and would not get it by leaving
    assert machine.ledger.recent()[0].plan.action is Action.REFUSE
    assert machine.ledger.holding("a") is not None


async def test_whether_it_would_be_refused_is_not_said_while_memory_settles() -> None:
    machine = Machine(300)
    await machine.resident("a")
    await machine.admit("b")
    machine.usages["b"] = replace(BUSY, pinned=True)
    machine.free_bytes = 100  # `b` has taken its 100 already, and is promised them still
    decided = len(machine.ledger.recent())
    refused = await machine.ledger.refusal(Ask.of_bytes("a", "a", 200, "cuda0"))
    assert refused is not None
    assert refused.settling
    assert refused.reason.startswith("waits until memory has settled: does not fit on cuda0: 200 B needed")
    assert len(machine.ledger.recent()) == decided


async def test_whether_it_would_be_refused_when_its_device_is_gone() -> None:
    machine = Machine(150)
    await machine.resident("a")
    machine.device = "cuda1"
    refused = await machine.ledger.refusal(Ask.of_bytes("a", "a", 100, "cuda0"))
    assert refused is not None
    assert isinstance(refused.error, DeviceUnavailable)


async def test_a_device_that_vanishes_while_somebody_waits_for_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there when the ask was made; the planner knew no device that may be used, and the round failed."""
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    machine = Machine(100)
    await machine.resident("a")
    machine.usages["a"] = BUSY
    load = asyncio.create_task(machine.admit("b"))
    await machine.until_waiting()
    machine.device = "cuda1"
    with pytest.raises(DeviceUnavailable, match="cuda0 cannot be used any more"):
        await load
    assert machine.ledger.holding("b") is None


async def test_the_refusal_at_the_deadline_tells_of_what_there_is_too_little() -> None:
    """It said that 100 were needed and 130 free: of those, 40 are promised and a reading does not show it."""
    machine = Machine(100)
    await machine.resident("a")
    machine.ledger.settle("a", [Held("cuda0", 100, unseen_bytes=40)])
    machine.free_bytes = 130
    machine.usages["a"] = BUSY
    with pytest.raises(
        DeviceMemoryShort, match=r"waited 0.05 s for memory of cuda0: 100 B needed, 90 B free"
    ) as caught:
        await machine.admit("b", timeout_s=0.05)
    assert (caught.value.metadata["needed_bytes"], caught.value.metadata["free_bytes"]) == ("100", "90")


async def test_at_the_deadline_those_who_came_later_wait_on() -> None:
    machine = Machine(100)
    await machine.resident("a")
    machine.usages["a"] = BUSY
    told: list[DeviceMemoryShort] = []
    loop = asyncio.get_running_loop()

    def tell(error: DeviceMemoryShort) -> float | None:
        told.append(error)
        return loop.time() + 0.05 if len(told) == 1 else None

    ask = Ask.of_bytes("b", "b", 100, "cuda0")
    with pytest.raises(DeviceMemoryShort):
        await machine.ledger.admit(ask, timeout_s=0.05, on_wait=machine.waits.append, on_late=tell)
    assert len(told) == 2


async def test_who_becomes_urgent_while_it_waits_is_served_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    machine = Machine(100)
    await machine.resident("a")
    machine.usages["a"] = machine.usages["first"] = machine.usages["batch"] = BUSY
    urgent = [-1]
    ask = Ask.of_bytes("batch", "batch", 100, "cuda0")
    first = asyncio.create_task(machine.admit("first"))
    await machine.until_waiting()
    batch = asyncio.create_task(
        machine.ledger.admit(ask, timeout_s=20, on_wait=machine.waits.append, priority=lambda: urgent[0])
    )
    await until(lambda: len(machine.ledger.waiting()) == 2)
    assert [decision.name for decision in machine.ledger.waiting()] == ["first", "batch"]
    urgent[0] = 1
    assert [decision.name for decision in machine.ledger.waiting()] == ["batch", "first"]
    machine.free_bytes = 100
    machine.ledger.release("a")
    assert (await batch).device == "cuda0"
    await leave(first)


async def test_decisions_are_listed_as_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease does not load, and what was not refused in the end was never refused."""
    monkeypatch.setattr(ledger_module, "RECHECK_S", 0.01)
    machine = Machine(100)
    ask = Ask.of_bytes(f"{LEASE_PREFIX}1", "training", 100, "cuda0")
    await machine.ledger.admit(ask, timeout_s=20, on_wait=machine.waits.append)
    assert [decision.plan.action for decision in machine.ledger.recent()] == [Action.HOLD]
    machine.free_bytes = 0
    machine.ledger.release(ask.key)
    load = asyncio.create_task(machine.admit("b"))
    await machine.until_waiting()
    machine.free_bytes = 100
    await load
    assert [decision.plan.action for decision in machine.ledger.recent()] == [Action.LOAD, Action.WAIT, Action.HOLD]


@pytest.mark.parametrize(
    ("usage", "hint"),
    [
        (replace(BUSY, pinned=True, by_name=True), "`a` is pinned and holds 100 B: `lm unpin a` lets it go"),
        (replace(BUSY, pinned=True), "`a` is kept for ever and holds 100 B: `lm stop a` lets it go"),
    ],
)
async def test_a_refusal_names_who_may_be_let_go(usage: Usage, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "LOAD_SETTLE_S", 0)
    machine = Machine(100)
    await machine.resident("a")
    machine.usages["a"] = usage
    with pytest.raises(DeviceMemoryShort) as caught:
        await machine.admit("b")
    assert caught.value.hint == hint
    with pytest.raises(DeviceMemoryShort) as caught:
        await machine.ledger.admit(Ask.of_bytes("c", "c", 101, "cuda0"), timeout_s=1, on_wait=machine.waits.append)
    assert "lets it go" not in caught.value.hint
