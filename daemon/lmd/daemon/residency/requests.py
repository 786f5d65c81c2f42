"""The requests of one model: who waits for its runner, who holds it, and how they use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lmd.daemon.residency.queueing import serving_all
from lmd.daemon.residency.ticket import Ticket
from lmd.daemon.residency.turns import AnswerTimes
from lmd.daemon.residency.values import LoadSettings
from lmd.daemon.runner_process import RunnerProcess

#: What asks for memory with which priority, and who leaves first.
INTERACTIVE, BATCH = 0, -1
#: A batch request that has waited for so long counts as an interactive one, as it does for a runner's slots.
BATCH_AGES_S = 20.0
#: A request that comes at once is a pause all the same: 0 means that there was none.
MIN_PAUSE_S = 1e-3


class Requests:
    """The queue in front of a runner, in order, and those that it has been handed to.

    Attributes:
        waiting: who has no runner yet.
        admitted: who holds the runner.
        pause_s: how soon it is usually asked again when it was idle; 0 when that never happened since it was loaded.
        shared: whether it has had two requests at once since it was loaded.
        answers: how long they hold it.
        narrow: whether what would have served all who wait does not fit, and nobody asked for just that: the first
            is tried alone.
    """

    def __init__(self, wait_s: float) -> None:
        """Make an empty queue; *wait_s* is how long each request may wait for memory and for running answers."""
        self.waiting: dict[Ticket, None] = {}
        self.admitted: set[Ticket] = set()
        self.pause_s = 0.0
        self.shared = False
        #: Which kinds have held it since it was loaded: whether they were batch requests.
        self._kinds: set[bool] = set()
        self.answers = AnswerTimes()
        self.narrow = False
        self._wait_s = wait_s
        self._clock_runs = False

    @property
    def first(self) -> Ticket:
        """Who waits in front."""
        return next(iter(self.waiting))

    @property
    def waits_since(self) -> float | None:
        """When the first of those who wait came, on the loop's clock."""
        return min((ticket.enqueued_at for ticket in self.waiting), default=None)

    @property
    def asking_priority(self) -> int:
        """How urgently those who wait want the model: as the most urgent of them."""
        aged = _now() - BATCH_AGES_S
        can_wait = bool(self.waiting) and all(t.batch and t.enqueued_at > aged for t in self.waiting)
        return BATCH if can_wait else INTERACTIVE

    @property
    def priority(self) -> int:
        """How much the loaded model is wanted: BATCH when nothing else has used it since it was loaded."""
        return BATCH if {*self._kinds, *(ticket.batch for ticket in self.waiting)} == {True} else INTERACTIVE

    def add(self, ticket: Ticket) -> None:
        """Put a ticket at the end of the queue."""
        self.waiting[ticket] = None
        if self._clock_runs:
            ticket.short_since = _now()

    def start_clock(self) -> None:
        """Count the time of those who wait, and of those who will, from now on: memory is short, or slots."""
        self._clock_runs = True
        for ticket in self.waiting:
            ticket.short_since = _now() if ticket.short_since is None else ticket.short_since

    def stop_clock(self) -> None:
        """Forget how long those who wait have waited: it was not in vain."""
        self._clock_runs = False
        for ticket in self.waiting:
            ticket.short_since = None

    def deadline(self, keep: Callable[[Ticket], bool] = lambda ticket: False) -> float | None:
        """Return when the time of the next one is up, of those who do not wait for something else (*keep*)."""
        since = [ticket.short_since for ticket in self.waiting if not keep(ticket)]
        return min((at + self._wait_s for at in since if at is not None), default=None)

    def is_late(self, ticket: Ticket) -> bool:
        """Tell whether a ticket's time is up."""
        return ticket.short_since is not None and _now() >= ticket.short_since + self._wait_s

    def refuse_late(self, error: Exception, keep: Callable[[Ticket], bool] = lambda ticket: False) -> int:
        """Refuse those whose time is up, unless *keep* says that they stay; return how many."""
        before = len(self.waiting)
        self.refuse(error, keep=lambda ticket: keep(ticket) or not self.is_late(ticket))
        return before - len(self.waiting)

    def position(self, ticket: Ticket) -> int:
        """Return how many wait in front of a ticket."""
        return next((place for place, other in enumerate(self.waiting) if other is ticket), 0)

    def note_pause(self, last_used: float) -> None:
        """Learn how soon an idle runner is asked again; the last pause counts as much as all before."""
        pause_s = max(_now() - last_used, MIN_PAUSE_S)
        self.pause_s = (self.pause_s + pause_s) / 2 if self.pause_s else pause_s

    def note_loaded(self) -> None:
        """Begin to learn anew: the model has just been loaded."""
        self.pause_s, self.shared, self.narrow = 0.0, False, False
        self._kinds.clear()

    def give_back(self, ticket: Ticket) -> bool:
        """Forget a ticket; tell whether it held the runner."""
        self.waiting.pop(ticket, None)
        if ticket not in self.admitted:
            return False
        self.admitted.discard(ticket)
        self.answers.note(_now() - ticket.admitted_at)
        return True

    def target(self, *others: LoadSettings) -> LoadSettings:
        """Return settings that serve as many of those who wait as possible, and *others*."""
        wanted = [ticket.settings for ticket in self.waiting]
        if self.narrow and wanted:
            return wanted[0]
        return serving_all([*wanted, *others])

    def admit_front(self, runner: RunnerProcess, serves: Callable[[Ticket], bool]) -> None:
        """Admit from the front of the queue as long as the runner serves them."""
        while self.waiting and serves(ticket := self.first):
            self._admit(ticket, runner)

    def admit_all(self, runner: RunnerProcess, serves: Callable[[Ticket], bool]) -> None:
        """Admit all whom the runner serves, wherever in the queue they are."""
        for ticket in [ticket for ticket in self.waiting if serves(ticket)]:
            self._admit(ticket, runner)

    def refuse(self, error: Exception, keep: Callable[[Ticket], bool] = lambda ticket: False) -> None:
        """Refuse those who wait, unless *keep* says that they stay."""
        for ticket in [ticket for ticket in self.waiting if not keep(ticket)]:
            del self.waiting[ticket]
            ticket.refuse(error)

    def refuse_larger(
        self, error: Exception, refused: LoadSettings, keep: Callable[[Ticket], bool] = lambda ticket: False
    ) -> None:
        """Refuse those for whom there is no memory, now that there is none for *refused*, unless *keep* says otherwise.

        Those who wait for less, or for another place, may still get it.
        """
        before = len(self.waiting)
        self.refuse(error, keep=lambda ticket: ticket.settings.asks_less_than(refused) or keep(ticket))
        self.narrow = 0 < before == len(self.waiting)

    def _admit(self, ticket: Ticket, runner: RunnerProcess) -> None:
        del self.waiting[ticket]
        self.admitted.add(ticket)
        self._kinds.add(ticket.batch)
        self.shared |= len(self.admitted) > 1
        ticket.admit(runner)


def _now() -> float:
    return asyncio.get_running_loop().time()
