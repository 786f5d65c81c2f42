"""Where the workers of a transfer and its hasher meet.

Workers hand in full buffers, which are written to the ingest. A buffer that continues the contiguous front goes on to
the hasher as it is, and the worker gets a spare one; everything else the hasher reads back from the page cache once
the front has reached it. So the bytes of a single stream are never read back, and memory does not grow either way.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmd.registry.errors import StoreError
from lmd.registry.segments import Segment, Segments

if TYPE_CHECKING:
    from lmd.registry.store import Ingest

BUFFER_BYTES = 1 << 20
SPARE_BUFFERS = 4
MIN_ROOM_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class _Handed:
    offset: int
    buffer: memoryview
    length: int


class Arrivals:
    """The bytes of one attempt at a file. Thread-safe.

    *segments* is None for a stream of unknown length, which arrives in order.
    """

    def __init__(self, ingest: Ingest, segments: Segments | None) -> None:
        self._ingest = ingest
        self._segments = segments
        # Guards everything below, and the segments; notified when there is something new for the hasher.
        self._changed = threading.Condition()
        self._front = segments.front if segments is not None else 0
        self._received = segments.received_bytes if segments is not None else 0
        self._ended = segments is not None and segments.complete
        self._error: BaseException | None = None
        self._handed: deque[_Handed] = deque()
        self._spares = [new_buffer() for _ in range(SPARE_BUFFERS)]
        self._unsynced = 0

    @property
    def received_bytes(self) -> int:
        """Bytes that are there, those of earlier transfers included."""
        return self._received

    # For workers.

    def take(self) -> Segment | None:
        """Return the next segment to work on, or None."""
        assert self._segments is not None
        with self._changed:
            return self._segments.take()

    def cut(self, step_bytes: int) -> int:
        """Divide the rest among several connections; only the one worker there is may call this.

        Returns how many segments wait for another worker.
        """
        assert self._segments is not None
        with self._changed:
            self._segments.cut(step_bytes)
            return self._segments.untaken_count

    def store(self, segment: Segment, buffer: memoryview, length: int) -> memoryview:
        """Write the next *length* bytes of a segment; return the buffer to go on with.

        Raises:
            DiskFull, StoreError: they cannot be written.
        """
        offset = segment.position
        self._ingest.write(offset, buffer[:length])
        with self._changed:
            self._ingest.note(offset, length)
            continues_front = offset == self._front
            if self._segments is None:
                segment.position += length
                self._received = self._front = segment.position
            else:
                self._segments.advance(segment, length)
                self._received, self._front = self._segments.received_bytes, self._segments.front
                self._ended = self._segments.complete
            self._unsynced += length
            if continues_front and self._spares:
                self._handed.append(_Handed(offset, buffer, length))
                buffer = self._spares.pop()
            self._changed.notify_all()
        return buffer

    def finish(self) -> None:
        """Say that a stream of unknown length has ended."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End the attempt; the first error counts, because others are its consequences."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    # For the checkpointing thread.

    def unsynced(self, at_least: int) -> bool:
        """Return whether *at_least* bytes arrived since this was last true."""
        with self._changed:
            if self._unsynced < at_least:
                return False
            self._unsynced = 0
            return True

    # For the hasher.

    def wake(self) -> None:
        """Let the hasher look around."""
        with self._changed:
            self._changed.notify_all()

    def next(self, hashed: int, scratch: memoryview, timeout_s: float) -> tuple[memoryview, memoryview | None]:
        """Return what follows the first *hashed* bytes, and a buffer to `give_back` after use, if any.

        Nothing (an empty view) when nothing came within *timeout_s*. *scratch* is used for reading back.

        Raises:
            What the attempt failed with; StoreError when the ingest cannot be read.
        """
        with self._changed:
            if self._front == hashed and not self._ended and self._error is None:
                self._changed.wait(timeout_s)
            if self._error is not None:
                raise self._error
            if self._handed and self._handed[0].offset == hashed:
                handed = self._handed.popleft()
                return handed.buffer[: handed.length], handed.buffer
            limit = self._handed[0].offset if self._handed else self._front
        wanted = scratch[: limit - hashed]
        if not wanted:
            return wanted, None
        try:
            count = os.preadv(self._ingest.fd, [wanted], hashed)
        except OSError as error:
            raise StoreError(f"cannot read back an ingest: {error.strerror}", operation="read") from error
        if count == 0:
            raise StoreError("an ingest is shorter than what was written to it", operation="read")
        return wanted[:count], None

    def give_back(self, buffer: memoryview) -> None:
        """Return a buffer that `next` lent."""
        with self._changed:
            self._spares.append(buffer)

    def all_hashed(self, hashed: int) -> bool:
        """Return whether the file has ended and *hashed* bytes are all of it."""
        with self._changed:
            return self._ended and hashed == self._received


class Inlet:
    """One worker's buffer. For one thread."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._buffer = new_buffer()
        self._fill = 0

    def room(self, segment: Segment) -> memoryview:
        """Return where the next bytes of *segment* go; empty when it is full."""
        return self._buffer[self._fill : min(BUFFER_BYTES, segment.missing_bytes)]

    def filled(self, count: int) -> None:
        """Count *count* bytes put into the room."""
        self._fill += count

    @property
    def is_full(self) -> bool:
        """Whether it is time to flush: for the last bit of room another system call does not pay."""
        return self._fill > BUFFER_BYTES - MIN_ROOM_BYTES

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to flush."""
        return self._fill == 0

    def flush(self, segment: Segment) -> None:
        """Hand in what is there. Raises DiskFull, StoreError."""
        length, self._fill = self._fill, 0
        if length:
            self._buffer = self._arrivals.store(segment, self._buffer, length)

    def drop(self) -> None:
        """Forget what is there."""
        self._fill = 0


def new_buffer() -> memoryview:
    """Return a buffer for receiving."""
    return memoryview(bytearray(BUFFER_BYTES))
