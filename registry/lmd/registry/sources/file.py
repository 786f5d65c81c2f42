"""Local files: a GGUF, and the shards that lie beside it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmd.registry.digest import Digest
from lmd.registry.errors import FileInvalid
from lmd.registry.gguf import GgufHeader, read_header
from lmd.registry.store.importing import open_regular

if TYPE_CHECKING:
    from lmd.registry.store import Store

_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.ASCII | re.IGNORECASE)
_MAX_SHARDS = 1024


@dataclass(frozen=True, slots=True)
class ImportedFile:
    """A file that is in the store now."""

    filename: str
    digest: Digest
    size_bytes: int


def shards_of(path: Path) -> tuple[Path, ...]:
    """Return the files of the model that *path* belongs to, in order: itself, or all shards of its set.

    Raises:
        FileInvalid: a shard is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if not 1 <= count <= _MAX_SHARDS:
        raise FileInvalid(str(path), f"its name claims {count} shards")
    shards = tuple(
        path.with_name(f"{match['prefix']}-{number:05}-of-{match['count']}{path.suffix}")
        for number in range(1, count + 1)
    )
    for shard in shards:
        if not shard.exists():
            raise FileInvalid(str(path), f"the shard {shard.name} is missing")
    return shards


def read_file_headers(paths: Sequence[Path]) -> list[GgufHeader]:
    """Read the headers of files.

    Raises:
        FileInvalid, GgufInvalid.
    """
    headers = []
    for path in paths:
        with os.fdopen(open_regular(path), "rb") as file:
            headers.append(read_header(file, os.fstat(file.fileno()).st_size))
    return headers


def import_files(
    store: Store,
    paths: tuple[Path, ...],
    *,
    on_progress: Callable[[Path, int, int], None],
    on_done: Callable[[ImportedFile], None],
    cancelled: threading.Event,
) -> tuple[ImportedFile, ...]:
    """Import files into the store; *on_progress* gets path, bytes done, and bytes in all.

    Raises:
        FileInvalid, GgufInvalid, FileChanged, DiskFull, StoreError, PullCancelled.
    """
    # Before anything is copied and hashed: what is no model need not take space first.
    read_file_headers(paths)
    imported = []
    for path in paths:

        def report(done: int, total: int, path: Path = path) -> None:
            on_progress(path, done, total)

        digest, size_bytes = store.import_file(path, on_progress=report, cancelled=cancelled)
        file = ImportedFile(path.name, digest, size_bytes)
        on_done(file)
        imported.append(file)
    return tuple(imported)
