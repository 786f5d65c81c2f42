"""Remembers what follows from a header, which is asked for each request and for each context that might fit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from lmd.registry.gguf import GgufHeader

MAX_HEADERS = 32

T = TypeVar("T")


def once_per_header(compute: Callable[[GgufHeader], T]) -> Callable[[GgufHeader], T]:
    """Return *compute* with a memory of the last headers. Thread-safe; two threads may both compute for a new one.

    Headers are immutable and large, so they are told apart by identity; the memory holds them, which keeps it true.
    """
    known: OrderedDict[int, tuple[GgufHeader, T]] = OrderedDict()
    lock = threading.Lock()

    def remembered(header: GgufHeader) -> T:
        with lock:
            found = known.get(id(header))
            if found is not None:
                known.move_to_end(id(header))
                return found[1]
        value = compute(header)
        with lock:
            known[id(header)] = header, value
            while len(known) > MAX_HEADERS:
                known.popitem(last=False)
        return value

    remembered.__doc__ = compute.__doc__
    return remembered
