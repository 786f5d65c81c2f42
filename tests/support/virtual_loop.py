"""An event loop whose clock jumps: whoever sleeps is woken as soon as nobody has anything else to do."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVarTuple

Ts = TypeVarTuple("Ts")

#: Rounds of the loop in one moment; more are a loop of tasks that wake each other.
MAX_ROUNDS = 20_000
TICK_S = 1e-9


class Stuck(AssertionError):
    """Raised when everyone waits for something that nobody will ever do."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs code of minutes and hours at once, the same way each time.

    Time passes only while nothing is ready, and a nanosecond with each round of the loop: as on every machine, nobody
    can wait for so short a while that the clock shows the same. Threads do not exist: what is given to an executor is
    done on the spot. There is no waiting for the world outside either; what is used with it must be in this process.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._stops_idle = False
        super().__init__(_Jumping(self))

    def time(self) -> float:
        """Return the virtual time, in seconds since the loop was made."""
        return self._now

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], Any], *args: *Ts) -> asyncio.Future[Any]:
        """Call *func* now."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def tick(self) -> None:
        """Let the least of times pass."""
        self._now += TICK_S

    def settle(self) -> None:
        """Run until nothing is ready; no time passes."""
        self._stops_idle = True
        try:
            self.run_forever()
        finally:
            self._stops_idle = False

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass, and run until nothing is ready then."""
        self.call_later(seconds, self.stop)
        self.run_forever()
        self.settle()

    def dissolve(self) -> None:
        """Cancel whatever is left, and close."""
        self.set_exception_handler(lambda loop, context: None)
        while tasks := asyncio.all_tasks(self):
            for task in tasks:
                task.cancel()
            self.advance(3600)
        self.close()

    def idle(self, timeout_s: float | None) -> None:
        """Nothing is ready before *timeout_s* are over, or ever: jump there."""
        if self._stops_idle:
            self.stop()
        elif timeout_s is None:
            raise Stuck("all tasks wait, and nothing is going to happen")
        else:
            self._now += timeout_s


class _Jumping(selectors.DefaultSelector):
    """Asks for events that are there; instead of waiting for others it makes the time pass."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop
        self._rounds = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._rounds = 0 if timeout != 0 else self._rounds + 1
        self._loop.tick()
        if self._rounds > MAX_ROUNDS:
            self._rounds = 0
            busy = sorted(f"{task.get_name()}: {task.get_stack(limit=1)}" for task in asyncio.all_tasks(self._loop))
            raise Stuck(f"no time passes, and somebody is always busy: {busy}")
        events: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not events and timeout != 0:
            self._loop.idle(timeout)
        return events
