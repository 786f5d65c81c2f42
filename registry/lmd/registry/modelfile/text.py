"""The text of a Modelfile: its encoding, its lines, and how values stand in them."""

from __future__ import annotations

import re

from lmd.registry.errors import ModelfileProblem, ModelfileSyntax

SPACES = " \t"
QUOTES = ('"""', '"')
_MAX_SHOWN = 200

_ENCODINGS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# What only a file that is no text has, or one in an encoding that was not recognised.
_BINARY = re.compile(r"[\x00\ud800-\udfff]")


def decode_modelfile(data: bytes) -> str:
    """Decode a Modelfile: UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ModelfileSyntax: at the first byte that is not text.
    """
    mark = next((mark for mark in _ENCODINGS if data.startswith(mark)), b"")
    encoding = _ENCODINGS.get(mark, "utf-8")
    body = data[len(mark) :]
    try:
        return body.decode(encoding)
    except UnicodeDecodeError as error:
        before = body[: error.start].decode(encoding, errors="replace")
        line_start = before.rpartition("\n")[2]
        problem = ModelfileProblem(
            before.count("\n") + 1, len(line_start) + 1, f"this is not text in {encoding.upper()}", cut(line_start)
        )
        raise ModelfileSyntax([problem]) from None


def split_lines(text: str) -> list[str]:
    """The lines of a Modelfile, whichever of the three line ends they have; nothing else ends a line."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def control_character(text: str) -> re.Match[str] | None:
    """Find a character that has no business in text: all control characters but tab and line feed, and surrogates."""
    return _CONTROL.search(text)


def binary_character(text: str) -> re.Match[str] | None:
    """Find a character that shows that this is no text at all."""
    return _BINARY.search(text)


def without_controls(line: str) -> str:
    """Return *line* without the characters that `control_character` finds."""
    return _CONTROL.sub("", line)


def raw_column(raw: str, column: int) -> int:
    """Where in the line *raw* the character *column* of ``without_controls(raw)`` stands; both count from 0."""
    kept = [at for at, char in enumerate(raw) if _CONTROL.match(char) is None]
    return kept[column] if column < len(kept) else len(raw)


def scan_value(lines: list[str], number: int, column: int) -> tuple[str, int] | None:
    """Read the value at *column* of line *number*; return it and the number of the line after it.

    None when a quoted value never ends.
    """
    first = lines[number][column:].strip(SPACES)
    quotes = next((mark for mark in QUOTES if first.startswith(mark)), "")
    if not quotes:
        return first, number + 1
    collected = [lines[number][column:].lstrip(SPACES)]
    minimum = 2 * len(quotes)
    while True:
        last = collected[-1].rstrip(SPACES)
        if last.endswith(quotes) and (len(collected) > 1 or len(last) >= minimum):
            collected[-1] = last
            return "\n".join(collected)[len(quotes) : -len(quotes)], number + len(collected)
        if number + len(collected) >= len(lines):
            return None
        collected.append(lines[number + len(collected)])


def quoted(value: str) -> str | None:
    """The first of the ways to write *value* that reads back as it is; None when there is none."""
    bare = value if value.strip(SPACES) == value and not value.startswith('"') else ""
    short, long = f'"{value}"', f'"""{value}"""'
    forms = (long, short) if "\n" in value else (bare, short, long)
    for form in filter(None, forms):
        lines = form.split("\n")
        if scan_value(lines, 0, 0) == (value, len(lines)) and not control_character(value):
            return form
    return None


def cut(line: str) -> str:
    """Shorten a line to what an error shows of it."""
    return line[:_MAX_SHOWN]
