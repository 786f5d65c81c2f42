"""One request's place in the queue of a model, and then its hold on the runner."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Protocol, Self

from lmd.daemon.residency.keep_alive import Wish
from lmd.daemon.residency.values import LoadSettings, Waiting
from lmd.daemon.runner_process import RunnerProcess


class TicketOffice(Protocol):
    """What a ticket reports to: the actor of its model."""

    def wait_status(self, ticket: Ticket) -> Waiting:
        """Say what the ticket waits for."""

    def give_back(self, ticket: Ticket) -> None:
        """Take the ticket back, once: its place, or its hold on the runner, is free."""


class Ticket:
    """A place in a queue that turns into a runner. Leave the `with` block to give either back.

    While an admitted ticket is held, its runner is not unloaded, except by force, and not evicted. *caller* is whose
    request it is, *wish* how long the caller wants the model to stay, and *batch* whether it can wait for interactive
    requests. Times are on the loop's clock.
    """

    def __init__(
        self, office: TicketOffice, settings: LoadSettings, wish: Wish, caller: str = "", *, batch: bool = False
    ) -> None:
        self.settings = settings
        self.wish = wish
        self.caller = caller
        self.batch = batch
        self.enqueued_at = asyncio.get_running_loop().time()
        self.admitted_at = 0.0
        #: Since when it has waited for memory, or for running answers of its model; None before that.
        self.short_since: float | None = None
        self._office = office
        self._open = True
        self._admitted: asyncio.Future[RunnerProcess] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def done(self) -> bool:
        """Whether the wait is over, one way or the other."""
        return self._admitted.done()

    @property
    def runner(self) -> RunnerProcess:
        """The runner that serves this request.

        Raises:
            LmdError: what the wait ended with.
        """
        return self._admitted.result()

    def raise_refusal(self) -> None:
        """Raise what the wait ended with, if it was not a runner."""
        self._admitted.result()

    def status(self) -> Waiting:
        """Say what the ticket waits for."""
        return self._office.wait_status(self)

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of the wait; tell whether it came in time."""
        if not self._admitted.done():
            await asyncio.wait([self._admitted], timeout=timeout_s)
        return self._admitted.done()

    def admit(self, runner: RunnerProcess) -> None:
        """Hand over the runner."""
        self.admitted_at = asyncio.get_running_loop().time()
        self._admitted.set_result(runner)

    def refuse(self, error: Exception) -> None:
        """End the wait with an error."""
        self._admitted.set_exception(error)
        self._admitted.exception()  # mark as seen: the holder may be gone

    def close(self) -> None:
        """Leave. Idempotent."""
        if self._open:
            self._open = False
            self._office.give_back(self)
            self._admitted.cancel()
