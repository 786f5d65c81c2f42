"""Blobs that are made here, from pieces, and hashed while they are written."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from lmd.registry.digest import Digest
from lmd.registry.errors import PullCancelled
from lmd.registry.store.blobs import Blobs
from lmd.registry.store.durable import Buffer, disk_errors, pwrite_all
from lmd.registry.store.importing import Progress
from lmd.registry.store.layout import Layout
from lmd.registry.store.reservations import Reservations


@dataclass(slots=True)
class Composer:
    """Writes blobs piece by piece; thread-safe."""

    layout: Layout
    blobs: Blobs
    reservations: Reservations

    def run(
        self,
        pieces: Iterable[Buffer],
        size_bytes: int,
        what: str,
        on_progress: Progress | None,
        cancelled: threading.Event | None,
    ) -> Digest:
        """Write *pieces*, which have *size_bytes* together; durable when it returns, and nothing stays on failure.

        Raises: PullCancelled, DiskFull (before the first byte), StoreError, and what *pieces* raises.
        """
        staged = self.layout.temporary()
        sha256 = hashlib.sha256()
        done_bytes = 0
        try:
            with self.reservations.reserve(size_bytes, what) as reservation:
                with disk_errors("compose", self.layout.root, needed_bytes=size_bytes):
                    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    for piece in pieces:
                        if cancelled is not None and cancelled.is_set():
                            raise PullCancelled(f"{what} was cancelled")
                        sha256.update(piece)
                        with disk_errors("compose", self.layout.root, needed_bytes=size_bytes - done_bytes):
                            count = pwrite_all(fd, piece, done_bytes)
                        done_bytes += count
                        reservation.shrink(count)
                        if on_progress is not None:
                            on_progress(done_bytes, size_bytes)
                    with disk_errors("compose", self.layout.root):
                        os.fsync(fd)
                finally:
                    os.close(fd)
        except BaseException:
            with suppress(OSError):
                staged.unlink()
            raise
        digest = Digest(sha256.hexdigest())
        self.blobs.place(staged, digest)
        return digest
