"""Blobs: bytes named by their digest, trusted only as far as they were hashed."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from lmd.registry.digest import Digest
from lmd.registry.errors import BlobCorrupt, BlobMissing, StoreError
from lmd.registry.store.durable import Buffer, disk_errors, fsync_dir, write_new
from lmd.registry.store.gate import Gate
from lmd.registry.store.layout import Layout
from lmd.registry.store.tables import Mark, Verified

log = logging.getLogger(__name__)

HASH_CHUNK_BYTES = 1 << 20
# Never follow a link out of the store, never wait for a writer of a FIFO.
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Blobs:
    """The blobs of a store; thread-safe.

    A file under a digest counts as that blob when its size, modification time and inode are those noted after it was
    hashed. Any other file there is hashed before anybody gets to see it; what does not hash to its name is moved to
    quarantine.
    """

    def __init__(self, layout: Layout, verified: Verified, gate: Gate, clock: Callable[[], float]) -> None:
        self._layout = layout
        self._verified = verified
        self._gate = gate
        self._clock = clock
        # Hashing a blob without a mark happens once, however many ask; it is rare enough to take turns.
        self._hashing = threading.Lock()

    def has(self, digest: Digest, size_bytes: int | None) -> bool:
        """Tell whether the blob is there, whole, and of that size.

        A wrong *size_bytes* alone condemns nothing: it may be the asker who is wrong.
        """
        try:
            status = self.require(digest)
        except (BlobMissing, BlobCorrupt):
            return False
        return size_bytes is None or status.st_size == size_bytes

    def require(self, digest: Digest) -> os.stat_result:
        """Give the file status of a blob that is known to be right.

        Raises: BlobMissing, BlobCorrupt.
        """
        if (status := self.peek(digest)) is not None:
            return status
        with self._hashing:
            if (status := self.peek(digest)) is not None:
                return status
            try:
                return self._rehash(digest)
            except BlobCorrupt:
                # A good one may have been put there meanwhile.
                if (status := self.peek(digest)) is not None:
                    return status
                raise

    def peek(self, digest: Digest) -> os.stat_result | None:
        """Give the file status of a blob that bears a valid mark, else None; never reads it."""
        status = self._lstat(digest)
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        return status if self._verified.get(digest) == Mark.of(status) else None

    def verify(self, digest: Digest) -> None:
        """Hash a blob whatever its mark says.

        Raises: BlobMissing, BlobCorrupt (after moving it to quarantine).
        """
        self._rehash(digest)

    def open(self, digest: Digest) -> BinaryIO:
        """Open a blob for reading. Raises: BlobMissing, BlobCorrupt."""
        self.require(digest)
        with disk_errors("open_blob", self._layout.root):
            return os.fdopen(os.open(self._layout.blob(digest), READ_FLAGS), "rb")

    def read(self, digest: Digest, max_bytes: int) -> bytes:
        """Read a small blob and hash what was read. Raises: BlobMissing, BlobCorrupt."""
        with self.open(digest) as file, disk_errors("read_blob", self._layout.root):
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise StoreError(f"blob {digest} is larger than {max_bytes} bytes", operation="read_blob")
        if Digest.of(data) != digest:
            # The file decayed under its mark.
            self.quarantine(digest)
            raise BlobCorrupt(str(digest))
        return data

    def put_bytes(self, data: Buffer) -> Digest:
        """Store *data*; durable when it returns. Raises: DiskFull, StoreError."""
        digest = Digest(hashlib.sha256(data).hexdigest())
        size_bytes = memoryview(data).nbytes
        with self._gate.change():
            if self.keep(digest, size_bytes):
                return digest
        staged = self._layout.temporary()
        with disk_errors("put_bytes", self._layout.root, needed_bytes=size_bytes):
            write_new(staged, data)
        self.place(staged, digest)
        return digest

    def keep(self, digest: Digest, size_bytes: int) -> bool:
        """Count a blob as just put if it is there with a valid mark; tell whether it is."""
        with self._gate.change():
            status = self.peek(digest)
            if status is None or status.st_size != size_bytes:
                return False
            self._verified.add(digest, Mark.of(status), self._clock())
            return True

    def place(self, staged: Path, digest: Digest) -> None:
        """Give the synced and hashed file *staged* its name; durable when it returns.

        On failure *staged* is gone, and the blob is there or not, but never half. Raises: DiskFull, StoreError.
        """
        try:
            with self._gate.change(), disk_errors("place_blob", self._layout.root):
                if self.keep(digest, staged.stat().st_size):
                    staged.unlink()
                    return
                self._make_way(digest)
                staged.chmod(0o444)
                staged.replace(self._layout.blob(digest))
                self._settle(digest)
        except BaseException:
            with suppress(OSError):
                staged.unlink()
            raise

    def link(self, fd: int, digest: Digest) -> bool:
        """Give the synced and hashed file open as *fd* a second name here; False where the system refuses.

        Raises: DiskFull, StoreError.
        """
        with self._gate.change(), disk_errors("link_blob", self._layout.root):
            if self.keep(digest, os.fstat(fd).st_size):
                return True
            self._make_way(digest)
            with suppress(FileNotFoundError):
                self._layout.blob(digest).unlink()
            try:
                # Through the descriptor: the path may name another file by now. Naming a directory, though it does not
                # matter for absolute paths, makes Python use linkat(2), which can follow the link in /proc.
                os.link(f"/proc/self/fd/{fd}", self._layout.blob(digest), src_dir_fd=fd, follow_symlinks=True)
            except OSError as error:
                log.debug("hard link refused: %s", error)
                return False
            self._settle(digest)
            return True

    def quarantine(self, digest: Digest, suspect: os.stat_result | None = None) -> None:
        """Move what lies under *digest* out of sight, keeping it for whoever wants to look.

        Given a *suspect*, does so only while that very file lies there.
        """
        with self._gate.change(), disk_errors("quarantine", self._layout.root):
            status = self._lstat(digest)
            if status is None or (suspect is not None and status.st_ino != suspect.st_ino):
                return
            number = 0
            while os.path.lexists(target := self._layout.quarantine / f"{digest.hex}.{number}"):
                number += 1
            self._layout.blob(digest).rename(target)
            fsync_dir(self._layout.blobs)
            fsync_dir(self._layout.quarantine)
            self._verified.forget([digest])
        log.warning("quarantined %s as %s", digest, target.name)

    def _settle(self, digest: Digest) -> None:
        """Make the new name of a blob durable and mark it."""
        path = self._layout.blob(digest)
        try:
            fsync_dir(self._layout.blobs)
        except OSError:
            # A name that may vanish must not be built upon.
            with suppress(OSError):
                path.unlink()
            raise
        self._verified.add(digest, Mark.of(path.lstat()), self._clock())

    def _make_way(self, digest: Digest) -> None:
        """Move away what a rename could not replace."""
        status = self._lstat(digest)
        if status is not None and not stat.S_ISREG(status.st_mode):
            self.quarantine(digest)

    def _rehash(self, digest: Digest) -> os.stat_result:
        try:
            fd = os.open(self._layout.blob(digest), READ_FLAGS)
        except FileNotFoundError as error:
            raise BlobMissing(str(digest)) from error
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EIO):
                raise StoreError(f"blob {digest} cannot be opened: {error.strerror}", operation="open_blob") from error
            self.quarantine(digest)
            raise BlobCorrupt(str(digest)) from error
        try:
            status = os.fstat(fd)
            whole = stat.S_ISREG(status.st_mode) and _hash(fd) == digest and Mark.of(os.fstat(fd)) == Mark.of(status)
            # Whoever put it there may not have synced it.
            if not whole or not _synced(fd):
                self.quarantine(digest, status)
                raise BlobCorrupt(str(digest))
        finally:
            os.close(fd)
        with self._gate.change(), disk_errors("has_blob", self._layout.root):
            fsync_dir(self._layout.blobs)
            present = self._lstat(digest)
            if present is None or Mark.of(present) != Mark.of(status):
                raise BlobMissing(str(digest))
            self._verified.renew(digest, Mark.of(status), self._clock())
        return status

    def _lstat(self, digest: Digest) -> os.stat_result | None:
        try:
            return self._layout.blob(digest).lstat()
        except FileNotFoundError:
            return None


def _hash(fd: int) -> Digest | None:
    """Hash a whole file; None where the disk cannot read it."""
    sha256 = hashlib.sha256()
    buffer = memoryview(bytearray(HASH_CHUNK_BYTES))
    try:
        while count := os.readv(fd, [buffer]):
            sha256.update(buffer[:count])
    except OSError as error:
        log.warning("reading a blob failed: %s", error)
        return None
    return Digest(sha256.hexdigest())


def _synced(fd: int) -> bool:
    try:
        os.fsync(fd)
    except OSError as error:
        log.warning("syncing a blob failed: %s", error)
        return False
    return True
