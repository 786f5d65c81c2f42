"""What lies in the drop-in folder, and which models it asks for.

    NAME.gguf                             the model NAME, from one file
    NAME-00001-of-00003.gguf, ...         the model NAME, once all its shards are there
    NAME.modelfile                        the model NAME, from a Modelfile
    NAME/Modelfile                        the same, in a subfolder together with its files

A Modelfile wins over a GGUF of the same name, which then is only its file. Names that start with a dot and names with
other endings are not looked at, so that downloads in progress (`x.gguf.part`, `.x.gguf.Ab3`) do no harm.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MODELFILE = "Modelfile"

#: The name of one of several files of a model.
SHARD = re.compile(r"(?P<base>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)

#: Inode, size and modification time in ns. Not ctime: to link a file changes that.
FileMark = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in the folder that asks for a model.

    *key* is its path below the folder and identifies it over restarts. *files* are the GGUF files in order and, for a
    Modelfile, only the Modelfile. *problem* says why nothing can come of it.
    """

    key: str
    stem: str
    files: tuple[Path, ...]
    is_modelfile: bool
    problem: str = ""


@dataclass(slots=True)
class _Shards:
    count: int
    files: dict[int, Path] = field(default_factory=dict)


def mark_of(path: Path) -> FileMark | None:
    """Return what changes when the file does; None when it is gone."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def scan(folder: Path) -> list[Entry]:
    """Return the entries of *folder*, Modelfiles first. Raises: OSError when the folder cannot be listed."""
    modelfiles: list[Entry] = []
    ggufs: list[Entry] = []
    shards: dict[str, _Shards] = {}
    with os.scandir(folder) as found:
        items = sorted(found, key=lambda item: item.name)
    for item in items:
        path = folder / item.name
        if item.name.startswith("."):
            continue
        lowered = item.name.lower()
        if lowered.endswith(".modelfile"):
            modelfiles.append(_single(item.name, path, is_modelfile=True))
        elif lowered.endswith(".gguf"):
            shard = SHARD.fullmatch(item.name)
            if shard is None or irregular(path):
                ggufs.append(_single(item.name, path, is_modelfile=False))
            else:
                group = shards.setdefault(f"{shard['base']}-of-{shard['count']}", _Shards(int(shard["count"])))
                group.files[int(shard["number"])] = path
        elif item.is_dir(follow_symlinks=False):
            inner = path / MODELFILE
            if inner.exists() or inner.is_symlink():
                modelfiles.append(_single(f"{item.name}/{MODELFILE}", inner, is_modelfile=True, stem=item.name))
    return modelfiles + ggufs + list(_complete(shards))


def _single(key: str, path: Path, *, is_modelfile: bool, stem: str = "") -> Entry:
    return Entry(key, stem or path.stem, (path,), is_modelfile, irregular(path))


def _complete(shards: dict[str, _Shards]) -> Iterator[Entry]:
    for key, group in shards.items():
        stem = key.rpartition("-of-")[0]
        missing = [number for number in range(1, group.count + 1) if number not in group.files]
        files = tuple(group.files[number] for number in sorted(group.files))
        if missing or len(files) != group.count:
            problem = f"{len(files)} of {group.count} shards are there" if missing else "shards are numbered wrongly"
            yield Entry(key, stem, files, False, problem)
        else:
            yield Entry(key, stem, files, False)


def irregular(path: Path) -> str:
    """Return why *path* is nothing to import, or nothing. Opening a FIFO would hang, a link could lead anywhere."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    if stat.S_ISREG(mode):
        return ""
    kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"))
    kind = next((name for test, name in kinds if test(mode)), "a special file")
    return f"it is {kind}, not a regular file"
