"""How long a model stays, for several callers with wishes of their own."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.residency.keep_alive import KeepAlive
from lmd.daemon.residency.values import FOR_EVER

MINUTE = timedelta(minutes=1)
DEFAULT = 5 * MINUTE


class Clock:
    """Stands in for the loop: a clock that only a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def time(self) -> float:
        return self.now_s

    def sleep(self, span: timedelta) -> None:
        self.now_s += span.total_seconds()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: made)
    return made


def ask(stay: KeepAlive, caller: str, asked: timedelta | None = None) -> None:
    stay.end(stay.begin(caller, asked), served=True)


def left(stay: KeepAlive, clock: Clock) -> timedelta | None:
    ends = stay.expires_at()
    return None if ends is None else timedelta(seconds=ends - clock.now_s)


def test_without_a_request_the_default_counts(clock: Clock) -> None:
    stay = KeepAlive(DEFAULT)
    assert left(stay, clock) == DEFAULT


def test_the_longest_wish_counts_until_it_has_run_out(clock: Clock) -> None:
    stay = KeepAlive(DEFAULT)
    ask(stay, "a", 60 * MINUTE)
    clock.sleep(10 * MINUTE)
    ask(stay, "b")
    ask(stay, "c", timedelta(0))
    assert left(stay, clock) == 50 * MINUTE
    clock.sleep(49 * MINUTE)
    ask(stay, "b")
    assert left(stay, clock) == DEFAULT


def test_a_caller_can_lower_its_own_wish_only(clock: Clock) -> None:
    stay = KeepAlive(DEFAULT)
    ask(stay, "a", FOR_EVER)
    ask(stay, "b", MINUTE)
    assert stay.for_ever
    ask(stay, "a", timedelta(0))
    assert not stay.for_ever
    assert left(stay, clock) == MINUTE


def test_a_request_that_does_not_ask_keeps_its_callers_wish(clock: Clock) -> None:
    stay = KeepAlive(DEFAULT)
    ask(stay, "a", 60 * MINUTE)
    clock.sleep(30 * MINUTE)
    ask(stay, "a")
    assert left(stay, clock) == 60 * MINUTE


def test_a_wish_that_has_run_out_is_forgotten(clock: Clock) -> None:
    stay = KeepAlive(DEFAULT)
    ask(stay, "a", MINUTE)
    ask(stay, "b", FOR_EVER)
    clock.sleep(2 * MINUTE)
    ask(stay, "a")
    ask(stay, "b", timedelta(0))
    assert left(stay, clock) == DEFAULT


def test_a_wish_does_not_run_while_its_caller_is_served(clock: Clock) -> None:
    stay = KeepAlive(DEFAULT)
    running = stay.begin("a", MINUTE)
    clock.sleep(60 * MINUTE)
    ask(stay, "b", timedelta(0))
    stay.end(running, served=True)
    assert left(stay, clock) == MINUTE


def test_a_request_that_was_not_served_starts_no_timer_again(clock: Clock) -> None:
    stay = KeepAlive(DEFAULT)
    ask(stay, "a", MINUTE)
    clock.sleep(MINUTE / 2)
    stay.end(stay.begin("a", None), served=False)
    assert left(stay, clock) == MINUTE / 2


def test_the_end_of_the_runner_ends_all_wishes(clock: Clock) -> None:
    stay = KeepAlive(DEFAULT)
    running = stay.begin("a", FOR_EVER)
    stay.reset()
    stay.end(running, served=True)
    assert left(stay, clock) == DEFAULT


callers = st.sampled_from("abc")
wishes = st.one_of(st.none(), st.integers(min_value=0, max_value=100).map(lambda n: timedelta(minutes=n)))


@given(
    steps=st.lists(st.tuples(callers, wishes, st.integers(min_value=0, max_value=30)), max_size=30),
    last=st.tuples(callers, wishes),
)
def test_no_request_makes_a_model_leave_earlier_than_another_caller_asked(
    steps: list[tuple[str, timedelta | None, int]], last: tuple[str, timedelta | None]
) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(asyncio, "get_running_loop", lambda: clock)
        stay = KeepAlive(DEFAULT)
        ends: dict[str, float] = {}
        values: dict[str, timedelta] = {}
        for caller, asked, pause in [*steps, (*last, 0)]:
            if ends.get(caller, 0.0) <= clock.now_s:
                values.pop(caller, None)
            values[caller] = asked if asked is not None else values.get(caller, DEFAULT)
            ask(stay, caller, asked)
            ends[caller] = clock.now_s + values[caller].total_seconds()
            assert stay.expires_at() == pytest.approx(max(ends.values()), abs=1e-6)
            clock.sleep(pause * MINUTE)
