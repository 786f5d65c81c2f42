"""What the measurements of residency compute from what they saw."""

from __future__ import annotations

from itertools import cycle, islice

import pytest

from bench.figures import Figure, table
from bench.residency_mixed import Outcome, Request, fair_share_s
from tests.support.least_recently_used import lru_loads


@pytest.mark.parametrize(
    ("models", "room", "loads"),
    [
        ("", 2, 0),
        ("aaaa", 2, 1),
        ("ababab", 2, 2),
        # The one that is asked for next has always just left.
        ("abcabc", 2, 6),
        # `a` was used after `b`, so `b` leaves for `c`.
        ("abaca", 2, 3),
        ("abacb", 2, 4),
        ("abcabc", 3, 3),
        ("abab", 1, 4),
    ],
)
def test_plain_lru_loads_what_is_not_among_the_last_used(models: str, room: int, loads: int) -> None:
    assert lru_loads(models, room) == loads


def test_the_fair_share_is_the_time_between_two_answers_of_the_same_client() -> None:
    """Two clients that take turns, an answer a second, get one each in two seconds; failures are no answers."""
    requests = [Request(client, "a", at, 8, at + 0.5, at + 1.0) for at, client in enumerate(islice(cycle((0, 1)), 10))]
    assert fair_share_s(requests, clients=2, elapsed_s=10.0) == 2.0
    requests[3].error = "RESOURCE_EXHAUSTED"
    requests[4].error = "RESOURCE_EXHAUSTED"
    assert fair_share_s(requests, clients=2, elapsed_s=10.0) == 2.5


def test_a_request_that_got_nothing_waited_until_it_failed() -> None:
    served = Request(0, "a", 1.0, 8, 3.0, 9.0)
    refused = Request(1, "a", 2.0, 8, None, 6.5, "RESOURCE_EXHAUSTED")
    cut = Request(2, "a", 2.0, 8, 2.5, 3.0, "UNAVAILABLE")
    outcome = Outcome("ours", [served, refused, cut], 2, 9.0, 2, 0.0)
    assert outcome.longest_wait_s == 4.5
    assert (outcome.errors, outcome.killed) == (2, 1)
    assert outcome.loads_per_request == pytest.approx(2 / 3)


def test_a_figure_without_a_bar_is_told_and_never_missed() -> None:
    told = Figure("case", "told", "s", 2.0, 1.0, 2.0, "", 0, 0.0)
    missed = Figure("case", "missed", "s", 2.0, None, 2.0, "<=", 1, 0.0)
    assert told.met
    assert not missed.met
    assert table([told, missed]).splitlines()[2:] == [
        "| told | 2 s | 1 s | 2 |  |  |",
        "| missed | 2 s |  | 2 | <= 1 | **no** |",
    ]
