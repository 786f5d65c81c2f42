"""Events of a stream, with a beat in between, so that a spinner moves while nothing comes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar

Event = TypeVar("Event")

#: How often a screen is brought up to date while nothing comes.
BEAT_S = 0.1


class _End:
    """Marks the end of the events."""


def with_ticks(events: Iterable[Event], beat_s: float = BEAT_S) -> Iterator[Event | None]:
    """Yield *events* as they come, and None whenever *beat_s* passes without one. Errors pass through.

    The events are read in a thread; whoever stops early makes *events* end, so that the thread does.
    """
    queue: SimpleQueue[Event | BaseException | type[_End]] = SimpleQueue()

    def read() -> None:
        try:
            for event in events:
                queue.put(event)
            queue.put(_End)
        except BaseException as error:
            queue.put(error)

    threading.Thread(target=read, name="events", daemon=True).start()
    while True:
        try:
            item = queue.get(timeout=beat_s)
        except Empty:
            yield None
            continue
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, type):
            return
        yield item
