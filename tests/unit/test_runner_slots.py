"""Slots know what the memory holds, share it only within a scope, and prompts share steps fairly."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from lmd.runner.job import Job, Request, plan_prefill
from lmd.runner.slots import Slot, Slots, common_prefix
from lmd.runner.text import TextStream
from lmd.runner.v1 import frames_pb2


class FakeMemory:
    """Rows of tokens. *broken* operations fail, as the engine's may."""

    def __init__(self, count: int, *, broken: bool = False) -> None:
        self.rows: list[list[int]] = [[] for _ in range(count)]
        self.broken = broken

    def reusable(self, sequence: int, length: int, shared: int, *, idle: bool) -> int:
        assert len(self.rows[sequence]) == length
        return shared

    def keep(self, sequence: int, length: int) -> bool:
        self.rows[sequence] = [] if self.broken else self.rows[sequence][:length]
        return not self.broken

    def copy(self, source: int, target: int, length: int) -> bool:
        self.rows[target] = [] if self.broken else self.rows[source][:length]
        return not self.broken

    def clear(self, sequence: int) -> None:
        self.rows[sequence] = []

    def decode(self, slot: Slot, tokens: list[int]) -> None:
        self.rows[slot.sequence] += tokens
        slot.tokens.extend(tokens)


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@given(
    st.lists(st.tuples(prompts, st.sampled_from("ab"), st.booleans(), st.integers(0, 3)), max_size=30), st.booleans()
)
def test_slots_agree_with_the_memory(requests: list[tuple[list[int], str, bool, int]], broken: bool) -> None:
    memory = FakeMemory(3, broken=broken)
    slots = Slots(memory, 3)
    running: list[Slot] = []
    owners: dict[int, tuple[str, list[int]]] = {}
    for prompt, scope, keeps_running, answer in requests:
        best = max(
            (
                common_prefix(array("i", row), array("i", prompt), len(prompt) - 1)
                for owner, row in owners.values()
                if owner == scope
            ),
            default=0,
        )
        slot = slots.take(array("i", prompt), scope)
        if slot is None:
            assert len(running) == 3
            slots.release(running.pop(0))
            continue
        assert slot not in running
        reused = list(slot.tokens)
        assert memory.rows[slot.sequence] == reused == prompt[: len(reused)]
        assert len(reused) == (0 if broken else best)
        memory.decode(slot, [*prompt[len(reused) :], *range(answer)])
        owners[slot.sequence] = (scope, memory.rows[slot.sequence])
        for sequence, (owner, _) in list(owners.items()):
            owners[sequence] = (owner, memory.rows[sequence])
        if keeps_running:
            running.append(slot)
        else:
            slots.release(slot)
    assert slots.busy_count == len(running)


def test_a_conversation_goes_on_in_its_slot_and_others_keep_theirs() -> None:
    memory = FakeMemory(2)
    slots = Slots(memory, 2)
    first = slots.take(array("i", [1, 2, 3, 4]), "")
    assert first is not None
    memory.decode(first, [1, 2, 3, 4])
    slots.release(first)
    # The same first token, but another conversation: it must not cost the first one its tokens.
    other = slots.take(array("i", [1, 9, 9]), "")
    assert other is not None
    assert other is not first
    assert list(other.tokens) == [1]
    slots.release(other)
    again = slots.take(array("i", [1, 2, 3, 4, 5]), "")
    assert again is first
    assert list(again.tokens) == [1, 2, 3, 4]


def test_another_scope_finds_nothing() -> None:
    memory = FakeMemory(2)
    slots = Slots(memory, 2)
    mine = slots.take(array("i", [1, 2, 3]), "mine")
    assert mine is not None
    memory.decode(mine, [1, 2, 3])
    assert slots.longest_prefix(array("i", [1, 2, 3]), "yours") == 0
    yours = slots.take(array("i", [1, 2, 3]), "yours")
    assert yours is not None
    assert list(yours.tokens) == []


def test_forgetting_idle_slots_spares_the_busy() -> None:
    memory = FakeMemory(2)
    slots = Slots(memory, 2)
    busy = slots.take(array("i", [1, 2]), "")
    idle = slots.take(array("i", [3, 4]), "")
    assert busy is not None
    assert idle is not None
    memory.decode(busy, [1, 2])
    memory.decode(idle, [3, 4])
    slots.release(idle)
    assert slots.forget_idle()
    assert not slots.forget_idle()
    assert memory.rows[busy.sequence] == [1, 2]
    assert memory.rows[idle.sequence] == []


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)), st.integers(0, 20))
def test_common_prefix(one: list[int], other: list[int], limit: int) -> None:
    expected = 0
    while expected < min(len(one), len(other), limit) and one[expected] == other[expected]:
        expected += 1
    assert common_prefix(array("i", one), array("i", other), limit) == expected


def job(order: int, length: int) -> Job:
    request = Request(order, order, frames_pb2.Sampling(), "", prompt=array("i", [0] * length))
    return Job(request, Slot(order), None, TextStream(()), cached_tokens=0, limit=1)


def test_the_shortest_prompt_goes_first() -> None:
    long, short = job(0, 100), job(1, 10)
    assert plan_prefill([long, short], 32) == [(short, 10), (long, 22)]


@given(st.integers(1, 64), st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_a_step_is_used_fully_and_never_overdrawn(budget: int, lengths: list[int]) -> None:
    jobs = [job(order, length) for order, length in enumerate(lengths)]
    plan = plan_prefill(jobs, budget)
    assert sum(count for _, count in plan) == min(budget, sum(lengths))
    assert all(0 < count <= planned.unread for planned, count in plan)


def test_a_long_prompt_is_not_starved_by_short_ones_that_keep_coming() -> None:
    long = job(0, 100)
    steps = 0
    while long.unread:
        steps += 1
        for planned, count in plan_prefill([long, job(steps, 16)], 16):
            planned.slot.tokens.extend([0] * count)
        assert steps < 40, "it waits for more tokens of others than it has itself"
