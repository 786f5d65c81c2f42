"""When a request's time is up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from lmd.daemon.errors import DeadlineExceeded


class Deadline:
    """A moment on the monotonic clock, set when a request arrives; without a time-out it never comes.

    *timeout_s* is what the caller allowed in all, and what the error tells.
    """

    __slots__ = ("_at", "_clock", "timeout_s")

    def __init__(self, timeout_s: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = math.inf if timeout_s is None else timeout_s
        self._clock = clock
        self._at = clock() + self.timeout_s

    @property
    def left_s(self) -> float:
        """Seconds that are left, never negative; infinite without a time-out."""
        return max(0.0, self._at - self._clock())

    @property
    def left_ms(self) -> int:
        """The time left as the runner's frames have it: at least 1, and 0 without a time-out."""
        return 0 if math.isinf(self._at) else max(1, int(self.left_s * 1000))

    def within(self, wait_s: float | None) -> float | None:
        """Return how long a wait of *wait_s* (None for ever) may take; None is for ever."""
        if math.isinf(self._at):
            return wait_s
        return self.left_s if wait_s is None else min(wait_s, self.left_s)

    def check(self) -> None:
        """Raise `DeadlineExceeded` when the time is up."""
        if self.left_s <= 0:
            raise self.error()

    def error(self) -> DeadlineExceeded:
        """Return the error to end a request with whose time is up."""
        return DeadlineExceeded(timeout_s=self.timeout_s)


def shorter(*timeouts_s: float | None) -> float | None:
    """Return the shortest time-out; None is none."""
    return min((timeout_s for timeout_s in timeouts_s if timeout_s is not None), default=None)
