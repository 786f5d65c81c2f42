from __future__ import annotations

import pytest

from lmd.daemon.deadline import Deadline, shorter
from lmd.daemon.errors import DeadlineExceeded


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_passes() -> None:
    clock = Clock()
    deadline = Deadline(2.5, clock=clock)
    assert (deadline.left_s, deadline.left_ms) == (2.5, 2500)
    assert (deadline.within(None), deadline.within(1.0), deadline.within(9.0)) == (2.5, 1.0, 2.5)
    clock.now += 2
    assert (deadline.left_ms, deadline.within(1.0)) == (500, 0.5)
    deadline.check()
    clock.now += 3
    assert deadline.left_s == 0
    with pytest.raises(DeadlineExceeded, match=r"not done within 2\.5 s") as caught:
        deadline.check()
    assert caught.value.metadata == {"timeout_s": "2.5"}


def test_a_runner_never_reads_no_time_left_as_no_limit() -> None:
    clock = Clock()
    deadline = Deadline(1, clock=clock)
    clock.now += 5
    assert deadline.left_ms == 1


def test_without_a_time_out_it_never_comes() -> None:
    clock = Clock()
    deadline = Deadline(clock=clock)
    clock.now += 1e9
    deadline.check()
    assert deadline.left_ms == 0
    assert deadline.within(None) is None
    assert deadline.within(3.0) == 3.0


def test_the_shorter_one_counts() -> None:
    assert shorter(None, None) is None
    assert shorter(None, 3.0) == 3.0
    assert shorter(2.0, 3.0) == 2.0
