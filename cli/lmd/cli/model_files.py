"""The files that a Modelfile refers to: single ones, folders, patterns, and shards of one model."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmd.cli.errors import ClientError

_FILE_PREFIXES = ("/", "./", "../", "~/", "file:")
_PATTERN = re.compile(r"[*?\[]")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_OTHER_FORMATS = (".safetensors", ".bin", ".pth", ".pt")


def referred_files(arguments: Sequence[str], directory: Path, *, attached: Sequence[str] = ()) -> dict[str, Path]:
    """Return the arguments of a Modelfile that are files, with their absolute paths.

    A relative path starts at *directory*, where the Modelfile is. What looks like a path must exist, and so must those
    in *attached*, which are never names; any other argument is a file if there is one of that name, and otherwise the
    name of a model. A folder, a pattern, and a shard whose siblings are not named stand for several files: their keys
    are ``ARGUMENT/NAME``.

    Raises:
        ClientError: a file is not there, or is not a regular one.
    """
    files: dict[str, Path] = {}
    named = [*arguments, *attached]
    for argument in named:
        if argument.startswith("sha256:"):
            continue
        looks_like_path = (
            argument.startswith(_FILE_PREFIXES) or argument in attached or argument.rstrip("/") in (".", "..")
        )
        path = directory / Path(argument.removeprefix("file:")).expanduser()
        mode = _mode(path, must_exist=looks_like_path and not _PATTERN.search(argument))
        if mode is None:
            if looks_like_path or (_PATTERN.search(argument) and argument.lower().endswith(".gguf")):
                files |= _below(argument, _matches(path))
        elif stat.S_ISDIR(mode) and (looks_like_path or argument.endswith("/")):
            if argument in attached:
                raise _not_importable(path, "it is a directory")
            files |= _below(argument, _one_model(path))
        elif stat.S_ISREG(mode):
            others = [] if argument in attached else _siblings(path, named, directory)
            files |= _below(argument, [path, *others]) if others else {argument: _real(path)}
        elif looks_like_path:
            raise _not_importable(path, "it is not a regular file")
    return files


def _mode(path: Path, *, must_exist: bool) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        why = "there is no such file"
    except OSError as error:
        why = (error.strerror or "it cannot be read").lower()
    if must_exist:
        raise _not_importable(path, why)
    return None


def _below(argument: str, paths: Sequence[Path]) -> dict[str, Path]:
    return {f"{argument.rstrip('/')}/{path.name}": _real(path) for path in paths}


def _matches(pattern: Path) -> list[Path]:
    found = [Path(path) for path in sorted(glob.glob(str(pattern))) if os.path.isfile(path)]
    if not found:
        raise _not_importable(pattern, "no file matches it")
    return found


def _one_model(folder: Path) -> list[Path]:
    """Return the GGUF files of a folder, which must be those of one model: a file or its shards, and a projector."""
    names = sorted(os.listdir(folder))
    ggufs = [name for name in names if name.lower().endswith(".gguf") and (folder / name).is_file()]
    if not ggufs:
        other = next((name for name in names if name.lower().endswith(_OTHER_FORMATS)), "")
        if other:
            raise ClientError(
                f"cannot import {folder}: {other} is not in GGUF",
                reason="FILE_INVALID",
                hint="convert it with llama.cpp's `convert_hf_to_gguf.py`, then name what comes out",
                metadata={"path": str(folder)},
            )
        raise _not_importable(folder, "there is no GGUF file in it")
    models = {_stem(name) for name in ggufs if "mmproj" not in name.lower()}
    if len(models) > 1:
        shown = ", ".join(sorted(models)[:5])
        raise ClientError(
            f"cannot import {folder}: it holds {len(models)} models: {shown}",
            reason="FILE_INVALID",
            hint="name one of them instead of the folder",
            metadata={"path": str(folder)},
        )
    return [folder / name for name in ggufs]


def _stem(name: str) -> str:
    found = _SHARD.fullmatch(name)
    return found["stem"] if found else name


def _siblings(path: Path, named: Sequence[str], directory: Path) -> list[Path]:
    """Return the other shards of the model that *path* is one of; none when the Modelfile names any of them itself."""
    found = _SHARD.fullmatch(path.name)
    if found is None or int(found["count"]) < 2:
        return []
    others = [other for other in _shards(path, found) if other != path]
    if any(directory / Path(argument.removeprefix("file:")).expanduser() in others for argument in named):
        return []
    missing = [other for other in others if not other.is_file()]
    if missing:
        raise _not_importable(path, f"it is one of {int(found['count'])} parts, and {missing[0].name} is not there")
    return others


def _shards(path: Path, found: re.Match[str]) -> Iterator[Path]:
    suffix = path.name[-len(".gguf") :]
    for number in range(1, min(int(found["count"]), 1024) + 1):
        yield path.with_name(f"{found['stem']}-{number:05d}-of-{found['count']}{suffix}")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _not_importable(path: Path, why: str) -> ClientError:
    return ClientError(
        f"cannot import {path}: {why}",
        reason="FILE_INVALID",
        hint="paths in a Modelfile start at its directory",
        metadata={"path": str(path)},
    )
