"""Which requests of a runner wait for a slot, and in which order they will get one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class RunnerQueue:
    """The requests of one runner that have no slot yet, next first.

    Ids grow with arrival. The runner decides the order and tells it now and then; what arrived since stands behind
    what it told, in the order of arrival.
    """

    def __init__(self) -> None:
        self._callers: dict[int, str] = {}
        self._places: dict[int, int] | None = None

    def __len__(self) -> int:
        return len(self._callers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._callers)

    def waiting_of(self, caller: str) -> int:
        """Return how many requests of *caller* wait."""
        return sum(other == caller for other in self._callers.values())

    def add(self, request_id: int, caller: str) -> None:
        """Put a request at the end."""
        self._callers[request_id] = caller
        self._places = None

    def discard(self, request_id: int) -> None:
        """Take a request out: it got a slot, or has ended."""
        if self._callers.pop(request_id, None) is not None:
            self._places = None

    def clear(self) -> None:
        """Take all out."""
        self._callers.clear()
        self._places = None

    def reorder(self, request_ids: Sequence[int]) -> None:
        """Take over the runner's order.

        A request that the runner must know, because it lists a later one, and does not list is about to start: it has
        left the runner's queue, and its `started` is under way.
        """
        told = {request_id: None for request_id in request_ids if request_id in self._callers}
        newest = max(request_ids, default=0)
        starting = [request_id for request_id in self._callers if request_id not in told and request_id < newest]
        arrived = [request_id for request_id in self._callers if request_id not in told and request_id > newest]
        self._callers = {request_id: self._callers[request_id] for request_id in [*starting, *told, *arrived]}
        self._places = None

    def position(self, request_id: int) -> int:
        """Return how many requests get a slot before this one; 0 when it does not wait."""
        if self._places is None:
            self._places = {waiting: place for place, waiting in enumerate(self._callers)}
        return self._places.get(request_id, 0)
