"""When a pull tries again, and when it gives up.

The budget counts tries *without progress*: a link that dies every megabyte still gets a file of any size, and one
that delivers nothing is given up after a known number of tries.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lmd.registry.cancel import CancelScope
from lmd.registry.errors import SourceError, SourceRateLimited, SourceUnavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently to try.

    tries: failures in a row without progress before giving up.
    base_s, cap_s: the wait doubles from one to the other.
    max_wait_s: the longest wait a server may ask for; more is an error that says how long.
    """

    tries: int = 6
    base_s: float = 0.5
    cap_s: float = 30.0
    max_wait_s: float = 60.0


class RetryBudget:
    """Counts failures in a row. Not thread-safe: each thread has its own."""

    def __init__(self, policy: RetryPolicy, rng: Callable[[], float] = random.random) -> None:
        self._policy = policy
        self._rng = rng
        self._failures = 0

    def after_failure(self, error: SourceError, *, progressed: bool) -> float:
        """Count a failure and return how long to wait before the next try, in seconds.

        Raises:
            SourceError: *error* itself, when the budget is spent or the server asks for a longer wait than allowed.
        """
        self._failures = 1 if progressed else self._failures + 1
        asked_s = error.retry_after_s
        if self._failures > self._policy.tries or (asked_s is not None and asked_s > self._policy.max_wait_s):
            raise error
        # Doubling with jitter in the upper half: many clients cut off together must not come back together.
        backoff_s = min(self._policy.cap_s, self._policy.base_s * 2.0 ** min(self._failures - 1, 30))
        backoff_s *= 0.5 + self._rng() / 2
        return backoff_s if asked_s is None else asked_s + backoff_s


def with_retries(
    policy: RetryPolicy, cancel: CancelScope, attempt: Callable[[], T], on_retry: Callable[[SourceError], None]
) -> T:
    """Return what *attempt* returns, trying again while the source is unavailable or asks to slow down.

    Raises:
        SourceError: the last failure, or one that trying again cannot help.
        PullCancelled: cancelled, also during a wait.
    """
    budget = RetryBudget(policy)
    while True:
        cancel.check()
        try:
            return attempt()
        except (SourceUnavailable, SourceRateLimited) as error:
            # A socket closed by the cancel looks like a broken connection.
            cancel.check()
            wait_s = budget.after_failure(error, progressed=False)
            on_retry(error)
            cancel.wait(wait_s)
