"""Who is served next: fair between callers, first come first served for each, and no prompt stalls the others.

Pure: no clock, no engine. Two decisions are made here.

**Who gets a slot** (`FairQueue`). Each caller has a virtual time: the tokens it was served, divided by its weight. The
waiting caller with the smallest goes first; within a caller requests keep their order. A caller that comes back after
a pause begins at the smallest virtual time of those that are active, so that idling saves up nothing. Interactive
requests go before batch ones of any caller, until one of those has waited long enough to count as interactive.
Source of the idea: start-time fair queueing (Goyal, Vin, Cheng 1996).

**Which prompts are decoded in a step** (`plan_prefill`). The one with the fewest tokens left goes first.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from lmd.runner.job import Place, Request
from lmd.runner.v1 import frames_pb2

#: A batch request that has waited so long counts as interactive.
BATCH_AGES_NS = 20 * 10**9

# What a request is taken to cost beyond its prompt when the order of the queue is foretold.
_EXPECTED_ANSWER_TOKENS = 128


class Prefilling(Protocol):
    """A prompt that is being decoded."""

    overtaken: int
    request: Request

    @property
    def unread(self) -> int:
        """Tokens still to be decoded."""


P = TypeVar("P", bound=Prefilling)


class FairQueue:
    """The places that wait for a slot, and what each caller was served. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[str, collections.deque[Place]] = {}
        self._virtual: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._running: collections.Counter[str] = collections.Counter()
        self._floor = 0.0
        self._size = 0

    def __len__(self) -> int:
        """Return how many places wait."""
        return self._size

    def __iter__(self) -> Iterator[Place]:
        """Iterate over the places, in no order."""
        for places in self._waiting.values():
            yield from places

    def push(self, place: Place) -> None:
        """Add a place at the end of its caller's."""
        caller = place.request.caller
        self._activate(caller, place.request.weight)
        self._waiting.setdefault(caller, collections.deque()).append(place)
        self._size += 1

    def start(self, place: Place) -> None:
        """Note that a place got its slot: it waits no more, and its caller is active until `end`."""
        self._running[place.request.caller] += 1
        self._take_out(place)

    def end(self, caller: str) -> None:
        """Note that a slot of *caller* is free again."""
        self._running[caller] -= 1
        self._settle(caller)

    def drop(self, request: Request) -> list[Place]:
        """Remove and return all places of a request."""
        places = [place for place in self._waiting.get(request.caller, ()) if place.request is request]
        for place in places:
            self._take_out(place)
        return places

    def charge(self, caller: str, tokens: int) -> None:
        """Count tokens that *caller*, which is active, was served."""
        self._virtual[caller] += tokens / self._weights[caller]

    def order(self, now_ns: int) -> list[Place]:
        """Return all places in the order in which they would be served from now on.

        What a request will have cost when the next one of its caller is chosen is a guess; the first place of all and
        the first of each caller are exact.
        """
        order: list[Place] = []
        urgent, patient = {}, {}
        for caller, places in self._waiting.items():
            first = [place for place in places if _is_urgent(place, now_ns)]
            if first:
                urgent[caller] = first
            if len(first) < len(places):
                patient[caller] = [place for place in places if not _is_urgent(place, now_ns)]
        virtual = dict(self._virtual)
        for group in (urgent, patient):
            order += self._interleave(group, virtual)
        return order

    def _interleave(self, group: dict[str, list[Place]], virtual: dict[str, float]) -> Iterator[Place]:
        left = {caller: collections.deque(places) for caller, places in group.items()}
        while left:
            caller = min(left, key=lambda name: (virtual[name], left[name][0].request.order))
            place = left[caller].popleft()
            cost = _EXPECTED_ANSWER_TOKENS + (len(place.request.prompt) if place.number == 0 else 0)
            virtual[caller] += cost / self._weights[caller]
            if not left[caller]:
                del left[caller]
            yield place

    def _activate(self, caller: str, weight: float) -> None:
        self._weights[caller] = weight
        if not self._is_active(caller):
            active = [self._virtual[name] for name in self._virtual if self._is_active(name)]
            self._floor = max(self._floor, min(active, default=self._floor))
            self._virtual[caller] = max(self._virtual.get(caller, 0.0), self._floor)

    def _is_active(self, caller: str) -> bool:
        return caller in self._waiting or self._running[caller] > 0

    def _take_out(self, place: Place) -> None:
        caller = place.request.caller
        places = self._waiting[caller]
        places.remove(place)
        self._size -= 1
        if not places:
            del self._waiting[caller]
            self._settle(caller)

    def _settle(self, caller: str) -> None:
        """Forget callers that left and have nothing to make up for, so that the table does not grow for ever."""
        if self._is_active(caller):
            return
        del self._running[caller]
        active = [self._virtual[name] for name in self._virtual if self._is_active(name)]
        # With nobody active the next one has nobody to be fair to.
        self._floor = max(self._floor, min(active, default=max(self._virtual.values(), default=0.0)))
        for name in [name for name, value in self._virtual.items() if value <= self._floor]:
            if not self._is_active(name):
                del self._virtual[name], self._weights[name]


def _is_urgent(place: Place, now_ns: int) -> bool:
    batch = place.request.message.priority == frames_pb2.PRIORITY_BATCH
    return not batch or now_ns - place.request.submitted_ns >= BATCH_AGES_NS


def plan_prefill(jobs: Iterable[P], budget: int) -> Sequence[tuple[P, int]]:
    """Share *budget* tokens among prompts that are being decoded; return who decodes how many.

    The prompt with the fewest tokens left goes first, since it delays the others least; equal ones finish one after
    the other, in the order they came. Every token that overtakes a prompt counts as one token less of its own, so a
    long one waits for no more tokens of others than it has itself.
    """
    plan: list[tuple[P, int]] = []
    left = budget
    for job in sorted(jobs, key=lambda job: (job.unread - job.overtaken, job.request.order)):
        count = min(job.unread, left)
        if count:
            plan.append((job, count))
            left -= count
        else:
            job.overtaken += budget
    return plan
