"""How fast something grows, and when it will be done."""

from __future__ import annotations

from collections import deque

_WINDOW_S = 6.0
_SHORTEST_S = 0.4


class Meter:
    """The rate of a growing number over the last few seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def update(self, now: float, completed_bytes: int) -> None:
        """Note that *completed_bytes* are done at *now*. A number that shrinks, or stood still for
        longer than the window, starts the measurement anew.
        """
        if self._samples and (completed_bytes < self._samples[-1][1] or now - self._samples[-1][0] > _WINDOW_S):
            self._samples.clear()
        self._samples.append((now, completed_bytes))
        while len(self._samples) > 2 and now - self._samples[1][0] > _WINDOW_S:
            self._samples.popleft()

    def rate(self, now: float) -> float | None:
        """Return bytes per second up to *now*, or None while too little is known."""
        if not self._samples:
            return None
        first_time, first_bytes = self._samples[0]
        elapsed = now - first_time
        return (self._samples[-1][1] - first_bytes) / elapsed if elapsed >= _SHORTEST_S else None

    def remaining_s(self, now: float, total_bytes: int) -> float | None:
        """Return the seconds until *total_bytes* at this rate, or None while that cannot be said."""
        rate = self.rate(now)
        if not rate or not self._samples:
            return None
        return max(0, total_bytes - self._samples[-1][1]) / rate
