"""Carries the latest value of each key from worker threads to the event loop, at a bounded rate."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")

#: At most five values a second for one key.
INTERVAL_S = 0.2


class Latest(Generic[V]):
    """Delivers values on the loop; a value that is replaced before its turn is never seen.

    That suits values that are absolute, such as "received 3 of 8 MB". A value for which *urgent(previous, value)*
    holds is delivered at once, others at most every *interval_s* for a key. Memory is bounded by the number of keys.
    """

    def __init__(
        self,
        deliver: Callable[[str, V], None],
        *,
        urgent: Callable[[V, V], bool],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._deliver = deliver
        self._urgent = urgent
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._delivered: dict[str, tuple[float, V]] = {}  # of the loop's thread only
        self._timer: asyncio.TimerHandle | None = None  # of the loop's thread only
        self._lock = threading.Lock()  # protects the two below
        self._pending: dict[str, V] = {}
        self._woken = False  # whether a turn will come for what is pending

    def put(self, key: str, value: V) -> None:
        """Replace the value of *key*. Callable from any thread; never blocks."""
        with self._lock:
            previous = self._pending.get(key)
            self._pending[key] = value
            if self._woken and previous is not None and not self._urgent(previous, value):
                return
            self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._turn)
        except RuntimeError:
            # The loop is closed: nobody is left to see it.
            return

    def flush(self) -> None:
        """Deliver everything that waits, whatever its rate. To be called on the loop."""
        self._cancel_timer()
        for key, value in self._take().items():
            self._hand_over(key, value)

    def _take(self) -> dict[str, V]:
        with self._lock:
            taken, self._pending = self._pending, {}
            self._woken = False
        return taken

    def _turn(self) -> None:
        self._cancel_timer()
        now = self._loop.time()
        early: dict[str, V] = {}
        wait_s = self._interval_s
        for key, value in self._take().items():
            last = self._delivered.get(key)
            if last is None or now - last[0] >= self._interval_s or self._urgent(last[1], value):
                self._hand_over(key, value)
            else:
                early[key] = value
                wait_s = min(wait_s, self._interval_s - (now - last[0]))
        if early:
            self._put_back(early)
            self._timer = self._loop.call_later(wait_s, self._turn)

    def _put_back(self, early: dict[str, V]) -> None:
        with self._lock:
            self._pending = early | self._pending  # what came meanwhile is newer
            self._woken = True  # by the timer

    def _hand_over(self, key: str, value: V) -> None:
        self._delivered[key] = (self._loop.time(), value)
        self._deliver(key, value)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
