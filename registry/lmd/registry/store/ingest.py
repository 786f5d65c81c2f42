"""Ingests: blobs on their way in, resumable after anything."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lmd.registry.digest import Digest
from lmd.registry.errors import DiskFull, StoreError
from lmd.registry.store import journal
from lmd.registry.store.blobs import Blobs
from lmd.registry.store.durable import Buffer, disk_errors, pwrite_all, replace_file
from lmd.registry.store.gate import Gate
from lmd.registry.store.layout import Layout
from lmd.registry.store.ranges import RangeSet

# A journal with more records is rewritten at the next checkpoint.
RECORDS_MAX = 1 << 14
OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Ingest:
    """One unfinished blob and its only writer.

    Threads may write, note and checkpoint at the same time, each its own range; `commit`, `reset` and `discard` come
    when the others are done. Nothing of an ingest is served before `commit`. A failed sync discards the part, and
    every call after that raises StoreError.
    """

    def __init__(
        self,
        layout: Layout,
        blobs: Blobs,
        key: str,
        total_bytes: int | None,
        boot_id: str,
        on_closed: Callable[[Ingest], None],
    ) -> None:
        self.key = key
        self.name = ingest_name(key)
        self.path, self._journal_path = part_paths(layout, self.name)
        self.total_bytes = total_bytes
        self._layout = layout
        self._blobs = blobs
        self._boot_id = boot_id
        self._on_closed = on_closed
        # Protects the ranges and the journal's end; never held while the data is synced.
        self._lock = threading.Lock()
        self._checkpointing = threading.Lock()
        self._open = True
        self.fd = -1
        self._journal_fd = -1
        with self._disk("begin_ingest", needed_bytes=4096):
            self._resume()

    def _resume(self) -> None:
        with suppress(FileNotFoundError):
            # A process that died between making it read-only and renaming it left it so.
            self.path.chmod(0o600)
        self.fd = os.open(self.path, OPEN_FLAGS, 0o600)
        try:
            size_bytes = os.fstat(self.fd).st_size
            found = self._read_journal()
            if found is None:
                self._received, self._durable = RangeSet(), RangeSet()
            else:
                self._received, self._durable = found.received.clip(size_bytes), found.durable.clip(size_bytes)
                self.total_bytes = self.total_bytes if self.total_bytes is not None else found.header.total_bytes
            self._write_journal()
            # Bytes behind the last trusted one would make the blob too long.
            ranges = self._received.list()
            os.ftruncate(self.fd, ranges[-1][1] if ranges else 0)
        except BaseException:
            self._close_fds()
            raise

    def _read_journal(self) -> journal.Replay | None:
        """Replay the journal; None when it is not about this blob."""
        try:
            with self._journal_path.open("rb") as file:
                found = journal.replay(file.read(journal.JOURNAL_MAX_BYTES), self._boot_id)
        except FileNotFoundError:
            return None
        if found is None or found.header.key != self.key:
            return None
        sizes = {found.header.total_bytes, self.total_bytes} - {None}
        return found if len(sizes) < 2 else None

    def _write_journal(self) -> None:
        """Replace the journal by a short one that says the same; it, and the part's name, are durable afterwards."""
        header = journal.JournalHeader(self.key, self.total_bytes, self._boot_id)
        durable = self._durable.list()
        rest = [each for each in self._received.list() if each not in set(durable)]
        content, self._records, self._notes = journal.encode_journal(header, durable, rest)
        replace_file(self._journal_path, content, self._layout.temporary())
        if self._journal_fd >= 0:
            os.close(self._journal_fd)
        self._journal_fd = os.open(self._journal_path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._journal_end = len(content)
        # Notes of this journal that its last checkpoint covers.
        self._covered = len(durable)

    def received(self) -> list[tuple[int, int]]:
        """List the ranges that can be trusted now, as sorted, disjoint ``(start, end)`` with *end* exclusive."""
        with self._lock:
            return self._received.list()

    @property
    def received_bytes(self) -> int:
        """The sum of `received`."""
        with self._lock:
            return self._received.total_bytes

    def write(self, offset: int, data: Buffer) -> None:
        """Write *data* at *offset*; it counts once `note` was called.

        Raises: DiskFull, StoreError.
        """
        self._check_open()
        with self._disk("write", needed_bytes=len(data)):
            pwrite_all(self.fd, data, offset)

    def note(self, offset: int, length: int) -> None:
        """Count written bytes as received: trusted after the death of the process, not after a power cut.

        Raises: DiskFull, StoreError.
        """
        if length <= 0:
            return
        with self._lock:
            self._check_open()
            self._append(journal.NOTE, offset, length)
            self._notes += 1
            self._received.add(offset, offset + length)

    def checkpoint(self) -> None:
        """Make what is received durable, so that it is trusted after a power cut too.

        Raises: DiskFull, StoreError; the part is discarded when the disk fails to sync it.
        """
        with self._checkpointing:
            with self._lock:
                self._check_open()
                covered, ranges = self._notes, self._received.list()
            if covered == self._covered:
                return
            self._sync("checkpoint", os.fdatasync, self.fd)
            with self._lock:
                self._check_open()
                self._append(journal.CHECKPOINT, covered, 0)
                self._covered = covered
                self._durable = RangeSet(ranges)
                if self._records > RECORDS_MAX:
                    with self._disk("checkpoint"):
                        self._write_journal()
                    return
            self._sync("checkpoint", os.fdatasync, self._journal_fd)

    def commit(self, digest: Digest, size_bytes: int) -> Digest:
        """Turn the part into the blob *digest*, durable when it returns; the caller has hashed it.

        A part of another size stays an ingest. Raises: DiskFull, StoreError.
        """
        with self._lock:
            self._check_open()
        self._sync("commit", os.fsync, self.fd)
        with self._disk("commit"):
            actual_bytes = os.fstat(self.fd).st_size
        if actual_bytes != size_bytes:
            raise StoreError(f"the ingest of {digest} has {actual_bytes} bytes, not {size_bytes}", operation="commit")
        try:
            self._blobs.place(self.path, digest)
        except BaseException:
            self.discard()
            raise
        self._remove()
        return digest

    def reset(self) -> None:
        """Forget everything that was received, and start over. Raises: DiskFull, StoreError."""
        with self._checkpointing, self._lock, self._disk("reset"):
            self._check_open()
            # The journal first: one that survives must never describe bytes written after it.
            self._received, self._durable = RangeSet(), RangeSet()
            self._write_journal()
            os.ftruncate(self.fd, 0)

    def discard(self) -> None:
        """Remove the part; harmless when repeated."""
        self._remove()

    def close(self) -> None:
        """Let go of the part and keep it for resume; harmless when repeated."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            self._close_fds()
        self._on_closed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, kind: int, first: int, second: int) -> None:
        record = journal.encode_record(self._records, kind, first, second)
        with self._disk("journal", needed_bytes=len(record)):
            # At the known end: a record that failed half-way is overwritten, not followed.
            pwrite_all(self._journal_fd, record, self._journal_end)
        self._journal_end += len(record)
        self._records += 1

    def _sync(self, operation: str, sync: Callable[[int], None], fd: int) -> None:
        try:
            with self._disk(operation):
                sync(fd)
        except (StoreError, DiskFull):
            self._remove()
            raise

    def _remove(self) -> None:
        with suppress(OSError):
            self._journal_path.unlink()
        with suppress(OSError):
            self.path.unlink()
        self.close()

    def _close_fds(self) -> None:
        for fd in (self.fd, self._journal_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._journal_fd = -1

    def _check_open(self) -> None:
        if not self._open:
            raise StoreError("the ingest is closed", operation="ingest")

    def _disk(self, operation: str, needed_bytes: int = 0) -> AbstractContextManager[None]:
        return disk_errors(operation, self._layout.root, needed_bytes=needed_bytes)


class Ingests:
    """The ingests of a store, each with at most one writer; thread-safe."""

    def __init__(self, layout: Layout, blobs: Blobs, gate: Gate, boot_id: str) -> None:
        self._layout = layout
        self._blobs = blobs
        self._gate = gate
        self._boot_id = boot_id
        self._writers: dict[str, Ingest | None] = {}

    def begin(self, key: str, total_bytes: int | None) -> Ingest:
        """Start or resume the ingest *key*.

        Raises: StoreError when it has a writer already, DiskFull.
        """
        name = ingest_name(key)
        with self._gate.change():
            if name in self._writers:
                raise StoreError(f"another writer has the ingest `{key}`", operation="begin_ingest")
            self._writers[name] = None
        try:
            ingest = Ingest(self._layout, self._blobs, key, total_bytes, self._boot_id, self._closed)
        except BaseException:
            with self._gate.hold():
                del self._writers[name]
            raise
        with self._gate.hold():
            self._writers[name] = ingest
        return ingest

    def has_writer(self, name: str) -> bool:
        """Tell whether somebody writes the ingest with that file name; stable while the gate is held."""
        return name in self._writers

    def close(self) -> None:
        """Let go of all ingests, keeping them for resume."""
        for ingest in list(self._writers.values()):
            if ingest is not None:
                ingest.close()

    def _closed(self, ingest: Ingest) -> None:
        with self._gate.hold():
            self._writers.pop(ingest.name, None)


def ingest_name(key: str) -> str:
    """Name the files of the ingest *key*, whatever characters it has."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def part_paths(layout: Layout, name: str) -> tuple[Path, Path]:
    """Give the paths of an ingest's bytes and of its journal."""
    return layout.ingest / f"{name}.part", layout.ingest / f"{name}.journal"


def read_key(layout: Layout, name: str) -> str | None:
    """Find the key of an ingest by the name of its files; None when its journal does not tell."""
    try:
        with part_paths(layout, name)[1].open("rb") as file:
            found = journal.read_header(file.read(1 << 16))
    except OSError:
        return None
    return found[0].key if found else None
