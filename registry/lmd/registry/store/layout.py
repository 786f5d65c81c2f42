"""Where things lie in a store.

blobs/sha256/<64 hex>       blobs, manifests among them; read-only files
ingest/<64 hex>.part        bytes of an unfinished blob; named by the SHA-256 of the ingest's key
ingest/<64 hex>.journal     which ranges of it have arrived
ingest/tmp-<random>         files in the making; worthless once their process is gone
quarantine/<name>.<n>       what lay under a digest without hashing to it
index.db, index.db-wal      tags, leases, verified marks
oci-layout, index.json      the derived OCI view
reserve                     room to delete something when the disk is full
lock, lock.pid              one process per store
kv/                         the daemon's saved KV: a cache that the store knows nothing of
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lmd.registry.digest import Digest
from lmd.registry.store.durable import disk_errors, fsync_dir

BLOB_NAME = re.compile(r"[0-9a-f]{64}")
PART_NAME = re.compile(r"([0-9a-f]{64})\.part")
TEMPORARY_PREFIX = "tmp-"
RESERVE_BYTES = 4 << 20


class Layout:
    """The paths of the store at *root*, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs" / "sha256"
        self.ingest = root / "ingest"
        self.quarantine = root / "quarantine"
        self.index_db = root / "index.db"
        self.oci_layout = root / "oci-layout"
        self.index_json = root / "index.json"
        self.reserve = root / "reserve"
        self.lock = root / "lock"

    def create(self) -> None:
        """Make the directories, private to this user.

        Raises: StoreError, DiskFull.
        """
        with disk_errors("create", self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for directory in (self.blobs.parent, self.blobs, self.ingest, self.quarantine):
                directory.mkdir(mode=0o700, exist_ok=True)
            self.root.chmod(0o700)

    def settle(self) -> None:
        """Drop temporary files of a process that is gone, and make every name it left durable.

        A rename whose process died before it could sync the directory is visible but may still be undone by a power
        cut; nobody must build on it before this.

        Raises: StoreError.
        """
        with disk_errors("recover", self.root):
            names = set(os.listdir(self.ingest))
            for name in names:
                orphan = name.endswith(".journal") and f"{name.removesuffix('.journal')}.part" not in names
                if name.startswith(TEMPORARY_PREFIX) or orphan:
                    (self.ingest / name).unlink()
            for directory in (self.blobs, self.blobs.parent, self.ingest, self.quarantine, self.root):
                fsync_dir(directory)

    def blob(self, digest: Digest) -> Path:
        """Give the path of the blob *digest*."""
        return self.blobs / digest.hex

    def temporary(self) -> Path:
        """Give a fresh name on the store's file system."""
        return self.ingest / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"

    def list_blobs(self) -> Iterator[tuple[Digest, os.stat_result]]:
        """List the regular files that are named by a digest; whatever else lies there is nobody's business."""
        for name, status in self._files(self.blobs):
            if BLOB_NAME.fullmatch(name):
                yield Digest(name), status

    def list_parts(self) -> Iterator[tuple[str, os.stat_result]]:
        """List the unfinished blobs by the hex digits that name them."""
        for name, status in self._files(self.ingest):
            if match := PART_NAME.fullmatch(name):
                yield match[1], status

    def list_quarantined(self) -> Iterator[tuple[str, os.stat_result]]:
        """List the files in quarantine."""
        return self._files(self.quarantine)

    def hold_reserve(self) -> None:
        """Occupy the room that a full disk will be short of; does nothing where there is none left."""
        with suppress(OSError):
            if self.reserve.stat().st_blocks * 512 >= RESERVE_BYTES:
                return
        try:
            fd = os.open(self.reserve, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        except OSError:
            self.free_reserve()
        finally:
            os.close(fd)

    def free_reserve(self) -> bool:
        """Give the room back; return whether there was any."""
        try:
            self.reserve.unlink()
        except OSError:
            return False
        return True

    @staticmethod
    def _files(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    yield entry.name, status
