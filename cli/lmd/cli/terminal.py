"""What may be written to a terminal: colours, widths, and nothing that steers it.

Names, licences, error texts and answers come from strangers. A terminal obeys escape sequences in them, so
everything that is shown to a person passes `printable`; data for pipes is left as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# C0 without tab and line feed, DEL, C1, and the characters that reorder or hide text around them.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SGR = re.compile(r"\x1b\[[0-9;]*m")
#: What stays on one line where it can: a word, or a command in backticks, which somebody may want to copy.
_PIECE = re.compile(r"(?:`[^`\n]*`|[^\s`]|`)+")


def printable(text: str) -> str:
    """Return *text* without the characters that steer a terminal; tabs and line feeds stay."""
    return _STEERING.sub("", text)


def one_line(text: str) -> str:
    """Return *text* on one line, ready for a table cell or a progress line."""
    return " ".join(printable(text).split())


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a person reads *stream*; a closed or missing stream is not a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def can_redraw(stream: TextIO | None) -> bool:
    """Return whether lines on *stream* can be drawn over: a terminal that is not dumb."""
    return is_terminal(stream) and os.environ.get("TERM", "") not in ("", "dumb")


def progress_wanted() -> bool:
    """Return whether progress may be shown; `LMD_NO_PROGRESS` (any value but 0) forbids it."""
    return os.environ.get("LMD_NO_PROGRESS", "") in ("", "0")


def use_colour(stream: TextIO | None) -> bool:
    """Return whether *stream* gets colours: a capable terminal, and no `NO_COLOR` (no-color.org)."""
    return can_redraw(stream) and not os.environ.get("NO_COLOR")


def terminal_size() -> os.terminal_size:
    """Return columns and rows of the terminal we write to, 80 by 24 when nothing knows better."""
    for descriptor in (1, 2):
        try:
            size = os.get_terminal_size(descriptor)
        except OSError:
            continue
        if size.columns and size.lines:
            return size
    return shutil.get_terminal_size((80, 24))


def without_colour(text: str) -> str:
    """Return *text* without the sequences that set colours."""
    return _SGR.sub("", text)


def cell_width(text: str) -> int:
    """Return how many cells *text*, colours aside, takes on a terminal."""
    plain = without_colour(text)
    if plain.isascii():
        return len(plain)
    from rich.cells import cell_len

    return cell_len(plain)


def wrapped(text: str, columns: int | None) -> str:
    """Return *text* with lines of *columns* cells at most, broken at blanks and outside of backticks only.

    A piece that is longer than a line stays whole. Without *columns* nothing is broken.
    """
    return text if columns is None else "\n".join(_wrapped_line(line, columns) for line in text.split("\n"))


def _wrapped_line(line: str, columns: int) -> str:
    if cell_width(line) <= columns:
        return line
    lines, rest = [""], line
    for piece in _PIECE.findall(line):
        gap, rest = rest.split(piece, 1)
        if lines[-1] and cell_width(lines[-1] + gap + piece) > columns:
            lines.append(piece)
        else:
            lines[-1] += gap + piece
    return "\n".join(lines)


def text_columns(stream: TextIO | None) -> int | None:
    """Return how wide running text on *stream* may be; None, for as wide as it is, where no terminal would break it."""
    return terminal_size().columns if is_terminal(stream) else None


def _owns_keyboard() -> bool:
    """Return whether stdin is our terminal and we are in its foreground; others would be stopped for touching it."""
    try:
        return is_terminal(sys.stdin) and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:  # a terminal of another session, as under `setsid`
        return False


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keep keys that are typed meanwhile off the screen; they reach the next prompt. Ctrl-C works as ever."""
    if not _owns_keyboard():
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class Palette:
    """One meaning per colour; every text reads the same without them."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.enabled and text else text

    def error(self, text: str) -> str:
        """Something failed."""
        return self._paint("1;31", text)

    def warning(self, text: str) -> str:
        """Something may surprise."""
        return self._paint("1;33", text)

    def hint(self, text: str) -> str:
        """What to do next."""
        return self._paint("36", text)

    def good(self, text: str) -> str:
        """Something is done, or well."""
        return self._paint("32", text)

    def difference(self, line: str) -> str:
        """One line of a unified diff."""
        if line.startswith(("--- ", "+++ ")):
            return self.strong(line)
        return self._paint({"-": "31", "+": "32", "@": "36"}.get(line[:1], ""), line) if line[:1] in "-+@" else line

    def strong(self, text: str) -> str:
        """A heading."""
        return self._paint("1", text)

    def faint(self, text: str) -> str:
        """Less important than what stands beside it."""
        return self._paint("2", text)


def palette_for(stream: TextIO | None) -> Palette:
    """Return the palette for *stream*."""
    return Palette(use_colour(stream))
