"""What a runner writes to standard error: the last lines for error messages, all of it in a rotated file."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

RING_BYTES = 16 << 10


class RunnerLog(asyncio.Protocol):
    """Receives the bytes of a runner's standard error.

    Memory is bounded by *ring_bytes*, the disk by *max_bytes* times *keep* plus one. A disk that takes no more ends
    the file, not the runner. Writes are small and go to the page cache, so they are done on the event loop.
    """

    def __init__(self, path: Path, *, max_bytes: int = 1 << 20, keep: int = 2, ring_bytes: int = RING_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._ring_bytes = ring_bytes
        self._ring = bytearray()
        self._file: FileIO | None = None
        self._size_bytes = 0
        self._transport: asyncio.BaseTransport | None = None
        self.closed = asyncio.Event()
        self._guarded(self._open)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep the end of *data* in memory and all of it in the file."""
        self._ring += data
        if len(self._ring) > 2 * self._ring_bytes:
            del self._ring[: -self._ring_bytes]
        self._guarded(lambda: self._write(data))

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the file: every holder of the pipe is gone."""
        self.close()

    def move(self, path: Path) -> None:
        """Write to *path* from now on, beginning with what came so far."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._path = path
        if not self.closed.is_set():
            self._guarded(self._open)
            self._guarded(lambda: self._write(bytes(self._ring)))

    def tail(self, limit: int = 1024) -> str:
        """Return the last lines, safe to print on a terminal."""
        text = bytes(self._ring[-4 * limit :]).decode("utf-8", errors="replace")
        printable = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
        return printable.strip()[-limit:]

    def close(self) -> None:
        """Stop listening; idempotent."""
        if self._transport is not None:
            self._transport.close()
        if self._file is not None:
            self._file.close()
            self._file = None
        self.closed.set()

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            log.warning("runner_log_lost", path=str(self._path), error=error.strerror)
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = FileIO(os.open(self._path, flags, 0o600), "wb")
        self._size_bytes = os.fstat(self._file.fileno()).st_size

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        if self._size_bytes + len(data) > self._max_bytes:
            self._rotate()
        if self._file is not None:
            self._file.write(data)
            self._size_bytes += len(data)

    def _rotate(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        for number in range(self._keep, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number - 1}")
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older)
        self._open()
