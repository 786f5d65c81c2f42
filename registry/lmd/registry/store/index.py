"""The store's SQLite database: one guarded connection, durable transactions.

Write-ahead log with ``synchronous=FULL``: the log is synced in every commit, so a transaction that returned survives a
power cut (the rollback journal does not promise that: losing the unlink of its journal undoes the transaction). The
locking mode is exclusive: the store's own lock keeps other processes out anyway, and there is no shared-memory file.

One connection serves all threads behind a re-entrant lock. Transactions are short; their longest part is the sync.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmd.registry.errors import DiskFull, StoreError
from lmd.registry.store.durable import disk_errors, free_bytes, fsync_dir
from lmd.registry.store.schema import migrate

DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# A transaction writes a few pages; on a full disk this is about what it lacks.
TRANSACTION_BYTES = 64 << 10


class IndexDamaged(Exception):
    """Raised when the database cannot be read; the recovery moves it aside."""


class Index:
    """The open database at *path*, at the newest schema; thread-safe.

    Raises: IndexDamaged, StoreError, DiskFull.
    """

    def __init__(self, path: Path, now: float) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._closed = False
        with self._errors("open"):
            db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            with self._errors("open"):
                self._prepare(db)
                migrate(db, now)
            with disk_errors("open_index", path.parent):
                path.chmod(0o600)
                fsync_dir(path.parent)
        except BaseException:
            db.close()
            raise
        self._db = db

    @staticmethod
    def _prepare(db: sqlite3.Connection) -> None:
        for pragma in (
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "trusted_schema = OFF",
            "cell_size_check = ON",
        ):
            db.execute(f"PRAGMA {pragma}").fetchall()
        verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise IndexDamaged(verdict)

    @contextmanager
    def read(self, operation: str) -> Iterator[sqlite3.Connection]:
        """Query inside the block. Raises: StoreError."""
        with self._lock:
            if self._closed:
                raise StoreError("the store is closed", operation=operation)
            try:
                with self._errors(operation):
                    yield self._db
            except IndexDamaged as error:
                raise StoreError(
                    f"the store's index is damaged: {error}",
                    operation=operation,
                    hint="restart the daemon; it rebuilds the index",
                ) from error

    @contextmanager
    def write(self, operation: str) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction: durable when it returns, undone when it raises. An inner block joins in.

        Raises: StoreError, DiskFull.
        """
        with self.read(operation) as db:
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self, operation: str) -> Iterator[None]:
        """Sort the errors that SQLite reports; a misuse of its interface is a defect and passes as it is."""
        try:
            yield
        except sqlite3.Error as error:
            if not hasattr(error, "sqlite_errorcode"):
                raise
            code = error.sqlite_errorcode & 0xFF
            root = self._path.parent
            if code == sqlite3.SQLITE_FULL:
                raise DiskFull(needed_bytes=TRANSACTION_BYTES, free_bytes=free_bytes(root), where=str(root)) from error
            if code in DAMAGED:
                raise IndexDamaged(str(error)) from error
            raise StoreError(f"the store's index failed: {error}", operation=operation) from error

    def close(self) -> None:
        """Close the database; harmless when repeated. What is committed is durable already."""
        with self._lock:
            if not self._closed:
                self._closed = True
                # Closing folds the log into the database; where that fails, the next open does it.
                with suppress(sqlite3.Error):
                    self._db.close()
