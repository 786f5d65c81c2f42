"""Texts that a command works on: from its arguments, from files, and line by line from stdin."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmd.cli.errors import BadUsage
from lmd.cli.terminal import is_terminal

#: Stands for the lines of stdin among arguments.
STDIN = "-"

#: What one call may carry: the daemon takes 2048 texts, and messages below 4 MiB.
MAX_TEXTS = 2048
MAX_BYTES = 2 << 20


def gather(arguments: Sequence[str], files: Sequence[Path], *, what: str) -> list[str]:
    """Return the texts of *arguments*, then those of *files*, each one text.

    An argument `-` stands for the lines of stdin that are not empty; so does nothing at all when something is piped in.

    Raises:
        BadUsage: there is no text, or one cannot be read.
    """
    if not arguments and not files and sys.stdin is not None and not is_terminal(sys.stdin):
        arguments = [STDIN]
    texts: list[str] = []
    for argument in arguments:
        texts += _lines() if argument == STDIN else [argument]
    texts += [_decoded(path.read_bytes(), f"`{path}`") for path in files]
    if not texts:
        raise BadUsage(f"no {what}", hint=f"give each {what} as an argument, one a line on stdin, or as a file")
    return texts


def stdin_text() -> str | None:
    """Return all of stdin, None when a person would have to type it."""
    if sys.stdin is None or is_terminal(sys.stdin):
        return None
    return _decoded(sys.stdin.buffer.read(), "stdin")


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield *texts* in order, in as few lists as one call each can carry."""
    batch: list[str] = []
    size_bytes = 0
    for text in texts:
        text_bytes = len(text.encode())
        if batch and (len(batch) == MAX_TEXTS or size_bytes + text_bytes > MAX_BYTES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(text)
        size_bytes += text_bytes
    if batch:
        yield batch


def _lines() -> list[str]:
    text = _decoded(sys.stdin.buffer.read(), "stdin") if sys.stdin is not None else ""
    return [line for line in text.splitlines() if line.strip()]


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadUsage(f"{where} is not text: {error.reason} at byte {error.start}") from None
