"""Reading a Modelfile for `lm create`: its text, the files it refers to, and what is wrong with it."""

from __future__ import annotations

import codecs
import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from lmd.cli.errors import BadUsage, ClientError
from lmd.cli.terminal import printable

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_LARGEST_BYTES = 16 * 1024 * 1024
_PLACE = re.compile(r"(\d+):(\d+)")
_FILE_PREFIXES = ("/", "./", "../", "~/", "file:")


def read_modelfile(path: str) -> str:
    """Return the text of the Modelfile at *path*, or of stdin for "-".

    Raises:
        BadUsage: it cannot be read, or is not text.
    """
    try:
        data = _read(sys.stdin.buffer, "stdin") if path == "-" else _read_file(Path(path))
    except OSError as error:
        raise BadUsage(
            f"cannot read {path}: {(error.strerror or 'failed').lower()}", hint="name another file with `-f`"
        ) from error
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadUsage(f"{path} is not a text in UTF-8: byte {error.start} is {data[error.start]:#04x}") from None


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise IsADirectoryError(0, "is a directory")
    with path.open("rb") as file:
        return _read(file, str(path))


def _read(file: BinaryIO, name: str) -> bytes:
    data = file.read(_LARGEST_BYTES + 1)
    if len(data) > _LARGEST_BYTES:
        raise BadUsage(f"{name} is too large for a Modelfile", hint="a model's own file goes behind FROM")
    return data


def referred_files(arguments: Sequence[str], directory: Path) -> dict[str, Path]:
    """Return the arguments of FROM and DRAFT that are files, with their absolute paths.

    A relative path starts at *directory*, where the Modelfile is. What looks like a path must exist; any other
    argument is a file if there is one of that name, and otherwise the name of a model.

    Raises:
        ClientError: a file is not there, or is not a regular one.
    """
    files = {}
    for argument in arguments:
        looks_like_path = argument.startswith(_FILE_PREFIXES)
        path = directory / Path(argument.removeprefix("file:")).expanduser()
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if looks_like_path:
                raise _not_importable(path, "there is no such file") from None
            continue
        except OSError as error:
            if looks_like_path:
                raise _not_importable(path, (error.strerror or "it cannot be read").lower()) from None
            continue
        if stat.S_ISREG(mode):
            files[argument] = Path(os.path.realpath(path))
        elif looks_like_path:
            raise _not_importable(path, "it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file")
    return files


def _not_importable(path: Path, why: str) -> ClientError:
    return ClientError(
        f"cannot import {path}: {why}",
        reason="FILE_INVALID",
        hint="paths in a Modelfile start at its directory",
        metadata={"path": str(path)},
    )


def with_places(error: ClientError, text: str, name: str) -> ClientError:
    """Return *error* with the lines of the Modelfile it complains about, and a caret below each mistake.

    The daemon gives the place of each mistake as "line:column", counted from 1.
    """
    lines = text.splitlines()
    context: list[str] = []
    for violation in error.violations:
        place = _PLACE.fullmatch(violation.field)
        if place is None:
            continue
        line, column = int(place[1]), int(place[2])
        if 1 <= line <= len(lines):
            if context:
                context.append("")
            context += [f"{name}:{line}:{column}", *_excerpt(lines[line - 1], column, violation.description)]
    if not context:
        return error
    return ClientError(
        error.message,
        reason=error.reason,
        hint=error.hint,
        metadata=error.metadata,
        violations=error.violations,
        context=context,
    )


def _excerpt(line: str, column: int, message: str) -> list[str]:
    before = printable(line[: column - 1]).expandtabs(4)
    shown = printable(line).expandtabs(4)
    start = max(0, len(before) - 60)
    cut = "…" if start else ""
    return [f"  {cut}{shown[start : start + 100]}", f"  {' ' * (len(before) - start + len(cut))}^ {message}"]
