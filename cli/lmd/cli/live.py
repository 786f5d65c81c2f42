"""A few lines at the bottom of a terminal that are drawn over in place, while finished text scrolls away above them.

Each change is one write, inside the terminal's synchronized-update brackets (terminals without them ignore the
brackets), so nothing flickers. After a resize the rows that the old lines take are counted anew at the new width,
as terminals wrap what stands on them again; nothing is left behind or wiped out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import terminal_size as TerminalSize
from typing import TextIO

from lmd.cli.terminal import cell_width, terminal_size

_BEGIN_UPDATE = "\x1b[?2026h"
_END_UPDATE = "\x1b[?2026l"
_HIDE_CURSOR = "\x1b[?25l"
_SHOW_CURSOR = "\x1b[?25h"
_CLEAR_LINE_END = "\x1b[K"
_CLEAR_SCREEN_END = "\x1b[J"


class LiveRegion:
    """The lines below everything else on *stream*, which must be a terminal. Use as a context manager.

    Between calls the cursor stands in the first column below the last line. Not thread-safe.
    """

    def __init__(self, stream: TextIO, size: Callable[[], TerminalSize] = terminal_size) -> None:
        self._stream = stream
        self._size = size
        self._widths: list[int] = []

    def draw(self, lines: Sequence[str], *, above: str = "") -> None:
        """Replace the region by *lines*; *above* is written for good before it and ends with a line feed.

        Lines are no wider than the terminal. Of more lines than fit, the last are shown.
        """
        columns, rows = self._size()
        shown = list(lines)[-max(rows - 2, 1) :]
        old_rows = sum(max(1, -(-width // columns)) for width in self._widths)
        parts = [_BEGIN_UPDATE, _HIDE_CURSOR if shown else "", "\r", f"\x1b[{old_rows}A" if old_rows else ""]
        if above:
            parts.append(_CLEAR_SCREEN_END)
            parts.append(above)
        parts += [f"{line}{_CLEAR_LINE_END}\n" for line in shown]
        parts += [_CLEAR_SCREEN_END, "" if shown else _SHOW_CURSOR, _END_UPDATE]
        self._widths = [cell_width(line) for line in shown]
        self._stream.write("".join(parts))
        self._stream.flush()

    def clear(self, *, above: str = "") -> None:
        """Take the region away."""
        if self._widths or above:
            self.draw([], above=above)

    def __enter__(self) -> LiveRegion:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
