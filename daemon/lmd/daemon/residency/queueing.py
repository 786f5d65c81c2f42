"""How many may wait for a model, and what to load it with for those who do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from lmd.daemon.errors import QueueFull
from lmd.daemon.residency.ticket import Ticket
from lmd.daemon.residency.values import Limits, LoadSettings
from lmd.daemon.runner_process import RunnerProcess

#: When a place in a full queue is free, as long as nothing is known of how fast answers come; and the bounds of what is
#: known later.
QUEUE_RETRY_S = 2.0
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


def check_room(limits: Limits, waiting: Collection[Ticket], runner: RunnerProcess | None, caller: str) -> None:
    """Refuse what is too much: one caller alone never fills the queue.

    Raises:
        QueueFull: there is no room, for anybody or for *caller*.
    """
    pending, own = (runner.pending, runner.pending_of(caller)) if runner is not None else (0, 0)
    retry_s = _retry_after_s(limits, runner)
    if len(waiting) + pending >= limits.max_queue:
        raise QueueFull(limit=limits.max_queue, retry_after_s=retry_s)
    own += sum(ticket.caller == caller for ticket in waiting)
    if own >= limits.max_queue_of_caller:
        raise QueueFull(limit=limits.max_queue_of_caller, retry_after_s=retry_s, own=True)


def serving_all(wanted: Sequence[LoadSettings]) -> LoadSettings:
    """Return settings that serve as many of *wanted* as possible: the largest context, the most exact KV."""
    num_ctx = max(settings.num_ctx for settings in wanted)
    floor = max(settings.min_ctx or settings.num_ctx for settings in wanted)
    exact = wanted[0].with_kv_type_of(wanted)
    return replace(exact, num_ctx=num_ctx, min_ctx=floor if floor < num_ctx else 0)


def _retry_after_s(limits: Limits, runner: RunnerProcess | None) -> float:
    """Guess when the next place is free: when one of the slots is."""
    if runner is None or not runner.mean_answer_s:
        return QUEUE_RETRY_S
    return min(max(runner.mean_answer_s / limits.slots, MIN_RETRY_S), MAX_RETRY_S)
