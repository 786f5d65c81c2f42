"""Sets of byte ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class RangeSet:
    """Sorted, disjoint, half-open byte ranges ``(start, end)`` that do not touch; not thread-safe."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total_bytes = 0
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Add the bytes from *start* up to *end*, merging with what they overlap or touch."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
            self.total_bytes -= sum(self._ends[first:last]) - sum(self._starts[first:last])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        self.total_bytes += end - start

    def clip(self, size_bytes: int) -> RangeSet:
        """Give the part below *size_bytes*."""
        return RangeSet((start, min(end, size_bytes)) for start, end in self.list())

    def list(self) -> list[tuple[int, int]]:
        """List the ranges in order."""
        return list(zip(self._starts, self._ends, strict=True))
