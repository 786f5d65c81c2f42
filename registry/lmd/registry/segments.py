"""Which bytes of a file are there, which are being fetched, and which come next. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MIN_SEGMENT_BYTES = 8 << 20
MAX_SEGMENT_BYTES = 64 << 20


@dataclass(slots=True, eq=False)
class Segment:
    """The bytes from *start* to *end*; those before *position* have arrived."""

    start: int
    end: int
    position: int

    @property
    def missing_bytes(self) -> int:
        """Bytes still to come."""
        return self.end - self.position


def segment_bytes_for(size_bytes: int) -> int:
    """Return how much one request asks for: a 32nd of the file, within bounds.

    Small enough that the connections work near the front, where the hasher follows; large enough that the cost of a
    request does not show.
    """
    return max(MIN_SEGMENT_BYTES, min(MAX_SEGMENT_BYTES, size_bytes // 32))


class Segments:
    """A file of known size cut into segments, handed out lowest first. Not thread-safe."""

    def __init__(self, size_bytes: int, received: Iterable[tuple[int, int]], segment_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._segments: list[Segment] = []
        self._pending: list[Segment] = []
        self._front_index = 0
        position = 0
        for start, end in sorted(received):
            start, end = max(start, position), min(end, size_bytes)
            if start >= end:
                continue
            self._cut(position, start, segment_bytes)
            self._segments.append(Segment(start, end, end))
            position = end
        self._cut(position, size_bytes, segment_bytes)
        self._pending = [segment for segment in reversed(self._segments) if segment.missing_bytes]
        self.received_bytes = size_bytes - sum(segment.missing_bytes for segment in self._segments)

    def _cut(self, start: int, end: int, segment_bytes: int) -> None:
        for at in range(start, end, segment_bytes):
            self._segments.append(Segment(at, min(end, at + segment_bytes), at))

    @property
    def pending_count(self) -> int:
        """Segments that nobody has taken."""
        return len(self._pending)

    @property
    def complete(self) -> bool:
        """Whether every byte has arrived."""
        return self.received_bytes == self.size_bytes

    @property
    def front(self) -> int:
        """The offset up to which every byte has arrived."""
        while self._front_index < len(self._segments):
            segment = self._segments[self._front_index]
            if segment.missing_bytes:
                return segment.position
            self._front_index += 1
        return self.size_bytes

    def take(self) -> Segment | None:
        """Return the lowest segment that nobody works on, or None."""
        return self._pending.pop() if self._pending else None

    def advance(self, segment: Segment, count: int) -> None:
        """Count the next *count* bytes of a segment as arrived."""
        segment.position += count
        self.received_bytes += count
