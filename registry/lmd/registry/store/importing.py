"""Importing a file from outside: shared where the file system can, linked where that is safe, else copied.

- *Reflink* (btrfs, XFS, bcachefs): the blob shares the file's blocks until either is written. What is hashed is the
  clone, so a writer cannot interfere.
- *Hard link*: only on the same file system, and when the file belongs to this user and nobody may write to it (no write
  bit in its mode). A file that its owner edits in place must not be a blob: the change would reach a model that is
  mapped. The link is made through the open descriptor, so it is the very inode that was hashed.
- *Copy*: what is written is what was hashed, in one pass.

A file whose device, inode, size, modification and change times are those of an earlier import is not read for its hash
again, except that a copy is hashed as it is written. Times are only believed when the file had been at rest for a
moment as it was hashed: a change within the same tick of the file system's clock would not show.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lmd.registry.digest import Digest
from lmd.registry.errors import DigestMismatch, FileChanged, FileInvalid, PullCancelled
from lmd.registry.store.blobs import READ_FLAGS, Blobs
from lmd.registry.store.durable import disk_errors, pwrite_all
from lmd.registry.store.layout import Layout
from lmd.registry.store.reservations import Reservations
from lmd.registry.store.tables import Facts

log = logging.getLogger(__name__)

# Source: linux/fs.h, FICLONE = _IOW(0x94, 9, int); the fcntl module names it from Python 3.12 on.
FICLONE = 0x40049409
CHUNK_BYTES = 4 << 20
# The kernel's file times move in ticks of at most 10 ms (CONFIG_HZ=100); FAT's in 2 s.
TICK_NS = 20_000_000
COARSE_TICK_NS = 2_000_000_000

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Importer:
    """Takes files into a store; thread-safe."""

    layout: Layout
    blobs: Blobs
    facts: Facts
    reservations: Reservations

    def run(
        self, path: Path, expected: Digest | None, on_progress: Progress | None, cancelled: threading.Event | None
    ) -> tuple[Digest, int]:
        """Import *path*; return its digest and size in bytes, durable when it returns.

        Raises: FileInvalid, FileChanged, DigestMismatch, PullCancelled, DiskFull, StoreError.
        """
        fd = open_regular(path)
        try:
            source = _Source(path, fd, on_progress, cancelled)
            known = self.facts.imported(source.status)
            if known is not None and self.blobs.has(known, source.size_bytes):
                _check_expected(path, known, expected)
                source.report(source.size_bytes)
                return known, source.size_bytes
            digest = (
                self._by_reflink(source, known, expected)
                or self._by_link(source, known, expected)
                or self._by_copy(source, expected)
            )
            self._remember(source, digest)
            return digest, source.size_bytes
        finally:
            os.close(fd)

    def flush(self, staged: Path) -> None:
        """Write a file that a process of ours made to the disk. Raises: FileInvalid, DiskFull, StoreError."""
        fd = open_regular(staged)
        try:
            with disk_errors("flush", self.layout.root):
                os.fsync(fd)
        finally:
            os.close(fd)

    def adopt(
        self, staged: Path, on_progress: Progress | None, cancelled: threading.Event | None
    ) -> tuple[Digest, int]:
        """Make a blob of a file that a process of ours wrote at `Layout.temporary`; on failure the file is gone.

        Raises: FileInvalid, FileChanged, PullCancelled, DiskFull, StoreError.
        """
        try:
            fd = open_regular(staged)
            try:
                source = _Source(staged, fd, on_progress, cancelled)
                digest = source.hash(fd)
                source.check_unchanged(links=False)
                with disk_errors("adopt", self.layout.root):
                    os.fsync(fd)
            finally:
                os.close(fd)
        except BaseException:
            with suppress(OSError):
                staged.unlink()
            raise
        self.blobs.place(staged, digest)
        return digest, source.size_bytes

    def _by_reflink(self, source: _Source, known: Digest | None, expected: Digest | None) -> Digest | None:
        staged = self.layout.temporary()
        with disk_errors("import", self.layout.root):
            fd = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.ioctl(fd, FICLONE, source.fd)
                except OSError as error:
                    log.debug("no reflink of %s: %s", source.path, error)
                    staged.unlink()
                    return None
                source.check_unchanged(links=False)
                digest = known or source.hash(fd)
                _check_expected(source.path, digest, expected)
                os.fsync(fd)
            except BaseException:
                with suppress(OSError):
                    staged.unlink()
                raise
            finally:
                os.close(fd)
        self.blobs.place(staged, digest)
        return digest

    def _by_link(self, source: _Source, known: Digest | None, expected: Digest | None) -> Digest | None:
        if not self._may_link(source.status):
            return None
        digest = known or source.hash(source.fd)
        source.check_unchanged(links=False)
        _check_expected(source.path, digest, expected)
        with disk_errors("import", self.layout.root):
            os.fsync(source.fd)
        if not self.blobs.link(source.fd, digest):
            return None
        source.check_unchanged(links=True)
        return digest

    def _may_link(self, status: os.stat_result) -> bool:
        return (
            status.st_dev == os.stat(self.layout.blobs).st_dev
            and status.st_uid == os.geteuid()
            and not status.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH | stat.S_ISUID | stat.S_ISGID)
        )

    def _by_copy(self, source: _Source, expected: Digest | None) -> Digest:
        staged = self.layout.temporary()
        with self.reservations.reserve(source.size_bytes, str(source.path)) as reservation:
            try:
                with disk_errors("import", self.layout.root, needed_bytes=source.size_bytes):
                    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    try:
                        digest = source.hash(source.fd, copy_to=fd, on_copied=reservation.shrink)
                        source.check_unchanged(links=False)
                        _check_expected(source.path, digest, expected)
                        os.fsync(fd)
                    finally:
                        os.close(fd)
            except BaseException:
                with suppress(OSError):
                    staged.unlink()
                raise
        self.blobs.place(staged, digest)
        return digest

    def _remember(self, source: _Source, digest: Digest) -> None:
        status = os.fstat(source.fd)
        changed_ns = max(status.st_mtime_ns, source.status.st_ctime_ns)
        tick_ns = COARSE_TICK_NS if changed_ns % 1_000_000_000 == 0 else TICK_NS
        if source.opened_ns - changed_ns > tick_ns:
            self.facts.note_import(status, digest)


@dataclass(slots=True)
class _Source:
    """The open file that is imported."""

    path: Path
    fd: int
    on_progress: Progress | None
    cancelled: threading.Event | None
    status: os.stat_result = field(init=False)
    opened_ns: int = field(init=False)

    def __post_init__(self) -> None:
        self.opened_ns = time.time_ns()
        self.status = os.fstat(self.fd)
        if self.size_bytes == 0:
            raise FileInvalid(str(self.path), "it is empty")

    @property
    def size_bytes(self) -> int:
        return self.status.st_size

    def report(self, done_bytes: int) -> None:
        if self.cancelled is not None and self.cancelled.is_set():
            raise PullCancelled("the import was cancelled")
        if self.on_progress is not None:
            self.on_progress(done_bytes, self.size_bytes)

    def check_unchanged(self, *, links: bool) -> None:
        """Compare the file with what it was when it was opened; a link of ours moves its change time."""
        now = os.fstat(self.fd)
        before = self.status
        same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if not same or (not links and now.st_ctime_ns != before.st_ctime_ns):
            raise FileChanged(str(self.path))

    def hash(self, fd: int, copy_to: int | None = None, on_copied: Callable[[int], None] | None = None) -> Digest:
        """Hash *fd* from its start to the size the file had, copying it on the way."""
        sha256 = hashlib.sha256()
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.size_bytes)))
        done_bytes = 0
        while done_bytes < self.size_bytes:
            self.report(done_bytes)
            count = os.preadv(fd, [buffer], done_bytes)
            if count == 0 or done_bytes + count > self.size_bytes:
                raise FileChanged(str(self.path))
            sha256.update(buffer[:count])
            if copy_to is not None:
                pwrite_all(copy_to, buffer[:count], done_bytes)
            if on_copied is not None:
                on_copied(count)
            done_bytes += count
        self.report(done_bytes)
        return Digest(sha256.hexdigest())


def open_regular(path: Path) -> int:
    """Open a regular file for reading, following no link and waiting for nobody; return the descriptor.

    Raises: FileInvalid.
    """
    try:
        # Looking first spares devices the side effects of being opened.
        _check_regular(path, os.lstat(path))
        fd = os.open(path, READ_FLAGS | os.O_NOCTTY)
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror).lower()
        raise FileInvalid(str(path), why) from error
    except ValueError as error:
        raise FileInvalid(str(path), "its path has a NUL character") from error
    try:
        _check_regular(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(path: Path, status: os.stat_result) -> None:
    kinds = {
        stat.S_IFLNK: "it is a symbolic link",
        stat.S_IFDIR: "it is a directory",
        stat.S_IFIFO: "it is a FIFO",
        stat.S_IFSOCK: "it is a socket",
        stat.S_IFCHR: "it is a device",
        stat.S_IFBLK: "it is a device",
    }
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise FileInvalid(str(path), kinds.get(kind, "it is not a regular file"))


def _check_expected(path: Path, actual: Digest, expected: Digest | None) -> None:
    if expected is not None and actual != expected:
        raise DigestMismatch(expected=str(expected), actual=str(actual), what=str(path))
