"""When to try again, and when to give up."""

from __future__ import annotations

import threading

import pytest

from lmd.registry.cancel import CancelScope
from lmd.registry.errors import PullCancelled, SourceDenied, SourceRateLimited, SourceUnavailable
from lmd.registry.retry import RetryBudget, RetryPolicy, with_retries

POLICY = RetryPolicy(tries=3, base_s=1.0, cap_s=5.0, max_wait_s=60.0)
DOWN = SourceUnavailable("down", ref="r")


def test_waits_double_up_to_the_cap() -> None:
    budget = RetryBudget(RetryPolicy(tries=6, base_s=1.0, cap_s=5.0), rng=lambda: 1.0)
    assert [budget.after_failure(DOWN, progressed=False) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_jitter_stays_in_the_upper_half() -> None:
    assert RetryBudget(POLICY, rng=lambda: 0.0).after_failure(DOWN, progressed=False) == 0.5


def test_the_budget_counts_failures_without_progress() -> None:
    budget = RetryBudget(POLICY, rng=lambda: 1.0)
    for _ in range(100):
        assert budget.after_failure(DOWN, progressed=True) == 1.0
    for _ in range(2):
        budget.after_failure(DOWN, progressed=False)
    with pytest.raises(SourceUnavailable):
        budget.after_failure(DOWN, progressed=False)


def test_what_the_server_asks_for_is_added_and_bounded() -> None:
    budget = RetryBudget(POLICY, rng=lambda: 1.0)
    assert budget.after_failure(SourceRateLimited("slow", ref="r", retry_after_s=60.0), progressed=False) == 61.0
    with pytest.raises(SourceRateLimited):
        budget.after_failure(SourceRateLimited("slow", ref="r", retry_after_s=60.5), progressed=True)


def test_only_what_may_pass_is_tried_again() -> None:
    tried: list[int] = []
    told: list[str] = []

    def attempt() -> str:
        tried.append(1)
        if len(tried) < 3:
            raise DOWN
        return "done"

    quick = RetryPolicy(tries=3, base_s=0.0)
    with CancelScope(threading.Event()) as cancel:
        assert with_retries(quick, cancel, attempt, lambda error: told.append(error.message)) == "done"
        assert told == ["down", "down"]

        def refuse() -> str:
            tried.append(1)
            raise SourceDenied("no", ref="r")

        tried.clear()
        with pytest.raises(SourceDenied):
            with_retries(quick, cancel, refuse, lambda _: None)
        assert len(tried) == 1


def test_a_cancel_ends_the_wait() -> None:
    event = threading.Event()

    def fail() -> str:
        raise DOWN

    with CancelScope(event) as cancel, pytest.raises(PullCancelled):
        with_retries(RetryPolicy(base_s=3600.0, cap_s=3600.0), cancel, fail, lambda _: event.set())
