"""Callers get their shares whatever they send, requests of one keep their order, and no prompt starves."""

from __future__ import annotations

import collections
from array import array
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lmd.runner.job import Place, Request
from lmd.runner.scheduler import BATCH_AGES_NS, FairQueue, plan_prefill
from lmd.runner.v1 import frames_pb2


class Shop:
    """A queue with requests that are served one at a time."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.count = 0
        self.now_ns = 0

    def ask(self, caller: str, *, weight: float = 1.0, prompt: int = 1, batch: bool = False) -> Place:
        self.count += 1
        message = frames_pb2.Submit(
            request_id=self.count,
            caller=caller,
            weight=weight,
            priority=frames_pb2.PRIORITY_BATCH if batch else frames_pb2.PRIORITY_UNSPECIFIED,
        )
        request = Request(message, self.count, submitted_ns=self.now_ns, prompt=array("i", [1] * prompt))
        place = Place(request)
        self.queue.push(place)
        return place

    def serve(self, tokens: int = 100) -> str:
        place = self.queue.order(self.now_ns)[0]
        self.queue.start(place)
        self.queue.charge(place.request.caller, tokens)
        self.queue.end(place.request.caller)
        return place.request.caller


def test_one_caller_with_many_requests_does_not_delay_another_one() -> None:
    shop = Shop()
    for _ in range(200):
        shop.ask("greedy")
    for _ in range(5):
        shop.serve()
    shop.ask("modest")
    assert "modest" in [shop.serve() for _ in range(2)]


def test_shares_are_by_tokens_and_not_by_requests() -> None:
    shop = Shop()
    for _ in range(60):
        shop.ask("long")
        shop.ask("short")
    served: collections.Counter[str] = collections.Counter()
    while min(served["long"], served["short"]) < 3000:
        caller = shop.queue.order(0)[0].request.caller
        tokens = 300 if caller == "long" else 100
        assert shop.serve(tokens) == caller
        served[caller] += tokens
    assert abs(served["long"] - served["short"]) <= 300


def test_twice_the_weight_is_twice_the_tokens() -> None:
    shop = Shop()
    for _ in range(90):
        shop.ask("heavy", weight=2.0)
        shop.ask("light")
    served = collections.Counter(shop.serve() for _ in range(60))
    assert abs(served["heavy"] - 40) <= 1


def test_idling_saves_nothing_up() -> None:
    shop = Shop()
    shop.ask("late")
    shop.serve()
    for _ in range(100):
        shop.ask("steady")
        shop.serve()
    for _ in range(20):
        shop.ask("steady")
        shop.ask("late")
    served = [shop.serve() for _ in range(10)]
    assert 4 <= served.count("late") <= 6


def test_batch_requests_wait_for_interactive_ones_but_not_for_ever() -> None:
    shop = Shop()
    shop.ask("night", batch=True)
    for _ in range(3):
        shop.ask("day")
    assert shop.serve() == "day"
    shop.now_ns = BATCH_AGES_NS
    assert shop.serve() == "night"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(1, 50)), max_size=30))
def test_the_order_names_everyone_once_and_keeps_each_callers_own(asks: list[tuple[str, bool, int]]) -> None:
    shop = Shop()
    places = [shop.ask(caller, batch=batch, prompt=prompt) for caller, batch, prompt in asks]
    order = shop.queue.order(0)
    assert sorted(p.request.order for p in order) == [p.request.order for p in places]
    for caller in "abc":
        for batch in (False, True):
            mine = [
                p.request.order
                for p in order
                if p.request.caller == caller and (p.request.message.priority == frames_pb2.PRIORITY_BATCH) == batch
            ]
            assert mine == sorted(mine)
    for place in places:
        shop.queue.drop(place.request)
    assert len(shop.queue) == 0
    assert shop.queue.order(0) == []


def test_callers_that_left_are_forgotten() -> None:
    shop = Shop()
    for number in range(1000):
        shop.ask(f"caller {number}")
        shop.serve()
    assert len(shop.queue._virtual) < 10
    assert len(shop.queue._weights) < 10


# Prompts


@dataclass(eq=False)
class Reading:
    request: Request
    unread: int
    overtaken: int = 0


def reading(order: int, unread: int) -> Reading:
    return Reading(Request(frames_pb2.Submit(), order), unread)


def test_the_shortest_prompt_goes_first() -> None:
    long, short = reading(1, 100), reading(2, 10)
    assert [(job.request.order, count) for job, count in plan_prefill([long, short], 50)] == [(2, 10), (1, 40)]


@given(st.integers(1, 100), st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_a_step_is_used_fully_and_never_overdrawn(budget: int, lengths: list[int]) -> None:
    plan = plan_prefill([reading(order, length) for order, length in enumerate(lengths)], budget)
    assert sum(count for _, count in plan) == min(budget, sum(lengths))
    assert all(1 <= count <= job.unread for job, count in plan)


def test_a_long_prompt_is_not_starved_by_short_ones_that_keep_coming() -> None:
    long = reading(0, 100)
    for order in range(1, 1000):
        jobs = [long, reading(order, 30)]
        for job, count in plan_prefill(jobs, 30):
            job.unread -= count
        if not long.unread:
            break
    assert order <= 10
