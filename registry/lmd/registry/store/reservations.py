"""Space promised to writers before their first byte."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from lmd.registry.errors import DiskFull

FLOOR_BYTES = 512 << 20
FLOOR_FRACTION = 0.02


@dataclass(frozen=True, slots=True)
class Space:
    """The state of a file system."""

    free_bytes: int
    total_bytes: int


class Reservations:
    """Adds up what running writers still need, so that two of them are never promised the same room; thread-safe.

    A floor stays free for the index and for everything else on the file system: 512 MiB, or 2 % of a small one.
    """

    def __init__(self, space: Callable[[], Space], where: str) -> None:
        self._space = space
        self._where = where
        self._lock = threading.Lock()
        self._outstanding_bytes = 0

    @property
    def outstanding_bytes(self) -> int:
        """Bytes promised and not yet written."""
        return self._outstanding_bytes

    def reserve(self, size_bytes: int, what: str) -> Reservation:
        """Promise *size_bytes* to *what*.

        Raises: DiskFull.
        """
        if size_bytes < 0:
            raise ValueError(f"cannot reserve {size_bytes} bytes")
        with self._lock:
            space = self._space()
            floor_bytes = min(FLOOR_BYTES, int(space.total_bytes * FLOOR_FRACTION))
            available_bytes = max(0, space.free_bytes - self._outstanding_bytes - floor_bytes)
            if size_bytes > available_bytes:
                where = f"{self._where} for {what}"
                raise DiskFull(needed_bytes=size_bytes, free_bytes=available_bytes, where=where)
            self._outstanding_bytes += size_bytes
        return Reservation(self, size_bytes)

    def give_back(self, size_bytes: int) -> None:
        """Take back part of a promise."""
        with self._lock:
            self._outstanding_bytes -= size_bytes


class Reservation:
    """Bytes promised to one writer until it releases them; a context manager; thread-safe."""

    def __init__(self, ledger: Reservations, size_bytes: int) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        """What is left of the promise."""
        return self._size_bytes

    def shrink(self, written_bytes: int) -> None:
        """Count *written_bytes* as written: the file system shows them as used from now on."""
        with self._lock:
            written_bytes = min(max(written_bytes, 0), self._size_bytes)
            self._size_bytes -= written_bytes
        self._ledger.give_back(written_bytes)

    def release(self) -> None:
        """Give back what is left; harmless when repeated."""
        self.shrink(self._size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
