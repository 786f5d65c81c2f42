"""One process per store."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lmd.registry.errors import StoreLocked
from lmd.registry.store.durable import disk_errors


class StoreLock:
    """Holds the lock at *path* until released; a file beside it names the owner.

    The kernel drops the lock when its owner dies, however that happens, so a stale one never blocks. The pid serves the
    error message only.

    Raises: StoreLocked when another process, or another Store in this one, holds it.
    """

    def __init__(self, path: Path) -> None:
        self._pid_file = path.with_name(f"{path.name}.pid")
        self._lock = FileLock(path, mode=0o600, thread_local=False)
        with disk_errors("lock", path.parent):
            try:
                self._lock.acquire(blocking=False)
            except Timeout as error:
                raise self._locked(path.parent) from error
        # A full disk must not keep the owner out; the pid is a courtesy.
        with suppress(OSError):
            self._pid_file.write_text(f"{os.getpid()}\n")

    def _locked(self, root: Path) -> StoreLocked:
        pid = ""
        with suppress(OSError):
            pid = self._pid_file.read_text()[:20].strip()
        owner = f"process {pid}" if pid.isdigit() else "another process"
        error = StoreLocked(
            f"{owner} owns the store {root}", operation="lock", hint="stop the other daemon, or give this one its own"
        )
        error.metadata["pid"] = pid
        return error

    def release(self) -> None:
        """Let others in; harmless when repeated."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._pid_file.unlink()
            self._lock.release()
