"""Reading a Modelfile for `lm create`: its text, and what is wrong with it."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lmd.cli.errors import BadUsage, ClientError, Violation
from lmd.cli.terminal import printable

if TYPE_CHECKING:
    from lmd.v1 import model_service_pb2

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_LARGEST_BYTES = 16 * 1024 * 1024
_PLACE = re.compile(r"(\d+):(\d+)")


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


def mistakes_error(mistakes: Sequence[model_service_pb2.ModelfileProblem]) -> ClientError:
    """Return the failure that the mistakes of a Modelfile, of which there is one at least, are."""
    first = mistakes[0]
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return ClientError(
        f"Modelfile line {first.line}: {first.message}{more}",
        reason="MODELFILE_SYNTAX",
        metadata={"line": str(first.line), "column": str(first.column)},
        violations=[Violation(f"{at.line}:{at.column}", at.message) for at in mistakes],
    )


def with_places(error: ClientError, text: str, name: str) -> ClientError:
    """Return *error* with the lines of the Modelfile it complains about, and a caret below each mistake.

    The daemon gives the place of each mistake as "line:column", counted from 1.
    """
    # Not `splitlines`, which ends lines at form feeds and the like as well.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
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
