"""Which bytes of a file are there, which are being fetched, and which come next. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MIN_STEP_BYTES = 8 << 20
MAX_STEP_BYTES = 64 << 20


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


def step_bytes_for(size_bytes: int) -> int:
    """Return how much one of several connections asks for at once: a 32nd of the file, within bounds.

    Small enough that the connections work near the front, where the hasher follows; large enough that the cost of a
    request does not show.
    """
    return max(MIN_STEP_BYTES, min(MAX_STEP_BYTES, size_bytes // 32))


class Segments:
    """A file of known size and its gaps, handed out lowest first. Not thread-safe.

    A gap is one segment until `cut` divides the gaps among several connections.
    """

    def __init__(self, size_bytes: int, received: Iterable[tuple[int, int]] = ()) -> None:
        self.size_bytes = size_bytes
        #: In order and without holes; those before the front's are complete.
        self._segments: list[Segment] = []
        self._front_index = 0
        position = 0
        for start, end in sorted(received):
            start, end = max(start, position), min(end, size_bytes)
            if start >= end:
                continue
            if position < start:
                self._segments.append(Segment(position, start, position))
            self._segments.append(Segment(start, end, end))
            position = end
        if position < size_bytes:
            self._segments.append(Segment(position, size_bytes, position))
        self._taken: set[int] = set()
        self.received_bytes = size_bytes - sum(segment.missing_bytes for segment in self._segments)

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

    @property
    def untaken_count(self) -> int:
        """Segments that nobody works on."""
        return sum(1 for segment in self._segments if self._is_open(segment))

    def take(self) -> Segment | None:
        """Return the lowest segment that nobody works on, or None."""
        for segment in self._segments[self._front_index :]:
            if self._is_open(segment):
                self._taken.add(segment.start)
                return segment
        return None

    def advance(self, segment: Segment, count: int) -> None:
        """Count the next *count* bytes of a segment as arrived."""
        segment.position += count
        self.received_bytes += count

    def cut(self, step_bytes: int) -> None:
        """Divide what is missing into segments of at most *step_bytes*; those being worked on keep their beginning."""
        divided: list[Segment] = []
        for segment in self._segments:
            end = segment.end
            if segment.missing_bytes > step_bytes:
                segment.end = segment.position + step_bytes
            divided.append(segment)
            divided += [Segment(at, min(end, at + step_bytes), at) for at in range(segment.end, end, step_bytes)]
        self._segments = divided

    def _is_open(self, segment: Segment) -> bool:
        return segment.missing_bytes > 0 and segment.start not in self._taken
