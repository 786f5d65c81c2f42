"""The directories in which runners keep saved KV, and the quota over all of them.

    kv/<64 hex of the manifest>/<engine version>-<settings>/<random>.kv

A runner writes and reads the files of its own directory; the daemon knows their size and when they were used last (the
modification time), and never looks inside. It is a cache: whatever is in the way of it is logged, and nothing fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from lmd.daemon.residency.facts import Pool
from lmd.daemon.tasks import TaskSet
from lmd.registry.digest import Digest
from lmd.registry.errors import LmdError

log = structlog.get_logger(__name__)

_MANIFEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX, _UNFINISHED = ".kv", ".tmp"


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size_bytes: int
    used_at: float


class SavedKv:
    """Saved KV of all models; for use on one event loop. A quota of 0 keeps none."""

    def __init__(self, root: Path, quota_bytes: int, engine_version: str, pool: Pool) -> None:
        self.quota_bytes = quota_bytes
        #: The manifests that have a name; called in a thread.
        self.named: Callable[[], Collection[Digest]] = frozenset
        #: The manifests that have a runner, or will in a moment; called in a thread.
        self.resident: Callable[[], Collection[Digest]] = frozenset
        self._root = root
        self._engine_version = engine_version
        self._pool = pool
        self._tidying = asyncio.Lock()
        self._tasks = TaskSet()

    async def prepare(self, manifest: Digest, engine_version: str, settings: str) -> Path | None:
        """Return the directory for one model under one engine and some settings; None when nothing can be kept.

        *settings* is a word that differs whenever a state of one load is of no use to another.
        """
        if not self.quota_bytes:
            return None
        path = self._root / manifest.hex / f"{_word(engine_version)}-{_word(settings)}"
        try:
            await self._pool.run(_make, self._root, path)
        except OSError as error:
            log.warning("saved_kv_unusable", path=str(path), error=error.strerror)
            return None
        return path

    def tidy_soon(self) -> None:
        """Remove in the background what is over the quota, unfinished, or of no use to anyone."""
        self._tasks.start(self._tidy(), name="tidy-kv")

    async def total_bytes(self) -> int:
        """Return the bytes of all that is saved."""
        return await self._pool.run(lambda: sum(file.size_bytes for file in _files(self._root)))

    async def stop(self) -> None:
        """Return when the removals under way are done."""
        await self._tasks.wait()

    async def _tidy(self) -> None:
        async with self._tidying:
            try:
                freed_bytes = await self._pool.run(self._tidy_now)
            except (OSError, LmdError) as error:
                log.warning("tidy_kv_failed", error=str(error))
                return
        if freed_bytes:
            log.info("saved_kv_removed", freed_bytes=freed_bytes)

    def _tidy_now(self) -> int:
        """Remove what has to go; return the bytes freed."""
        before = sum(file.size_bytes for file in _files(self._root))
        resident = {manifest.hex for manifest in self.resident()}
        named = {manifest.hex for manifest in self.named()} if self.quota_bytes else set()
        for model in _directories(self._root):
            if model.name in resident or not _MANIFEST.fullmatch(model.name):
                continue
            if model.name not in named:
                shutil.rmtree(model, ignore_errors=True)
                continue
            for settings in _directories(model):
                if not settings.name.startswith(f"{_word(self._engine_version)}-"):
                    shutil.rmtree(settings, ignore_errors=True)
                    continue
                for unfinished in settings.glob(f"*{_UNFINISHED}"):
                    unfinished.unlink(missing_ok=True)
                _remove_empty(settings)
            _remove_empty(model)
        files = sorted(_files(self._root), key=lambda file: file.used_at)
        total_bytes = sum(file.size_bytes for file in files)
        # Also those of resident models: a runner takes a file that is gone for one it never had. What it is writing
        # this moment is its own.
        for file in files:
            if total_bytes <= self.quota_bytes:
                break
            if file.path.suffix == _SUFFIX:
                file.path.unlink(missing_ok=True)
                total_bytes -= file.size_bytes
        return before - total_bytes


def _make(root: Path, path: Path) -> None:
    for directory in (root, path.parent, path):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(13, "not writable", str(path))


def _files(root: Path) -> Iterator[_File]:
    """List the saved prefixes, finished or not, as far as they can be read."""
    for model in _directories(root):
        for settings in _directories(model):
            with contextlib.suppress(OSError), os.scandir(settings) as entries:
                for entry in entries:
                    if entry.name.endswith((_SUFFIX, _UNFINISHED)) and not entry.is_dir(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            yield _File(Path(entry.path), status.st_size, status.st_mtime)


def _directories(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # not there; one that cannot be read is as good as that
        return []


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # not empty, or not ours to remove
        directory.rmdir()


def _word(text: str) -> str:
    """Make text fit for a part of a file name."""
    return re.sub(r"[^0-9A-Za-z.+_-]", "_", text) or "_"
