"""A terminal screen with scrollback, as far as the client's redrawing needs one."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\x1b\[(?P<args>[?0-9;]*)(?P<kind>[a-zA-Z])|(?P<text>[^\x1b])", re.DOTALL)


class Screen:
    """Takes what a program writes, as a text stream does, and knows what a person then sees."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self._lines: list[list[str]] = [[]]
        self._row = self._column = 0

    def write(self, text: str) -> int:
        """Apply *text*."""
        end = 0
        for token in _TOKEN.finditer(text):
            assert token.start() == end, f"unknown sequence in {text[end : end + 20]!r}"
            end = token.end()
            if token["text"] is not None:
                self._put(token["text"])
            else:
                self._control(token["kind"], token["args"])
        return len(text)

    def flush(self) -> None:
        """Do nothing: everything is on the screen at once."""

    def isatty(self) -> bool:
        """Claim to be a terminal."""
        return True

    @property
    def text(self) -> str:
        """Everything from the first line of the scrollback to the last line with text."""
        return "\n".join("".join(line).rstrip() for line in self._lines).rstrip("\n")

    def _put(self, character: str) -> None:
        if character == "\n":  # the terminal's line discipline sends a carriage return with it
            self._column = 0
            self._down()
            return
        if character == "\r":
            self._column = 0
            return
        if self._column == self.columns:
            self._column = 0
            self._down()
        line = self._lines[self._row]
        line += " " * (self._column + 1 - len(line))
        line[self._column] = character
        self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._lines):
            self._lines.append([])

    def _control(self, kind: str, args: str) -> None:
        if kind == "A":
            top = max(0, len(self._lines) - self.rows)
            self._row = max(top, self._row - int(args or 1))
        elif kind == "K":
            del self._lines[self._row][self._column :]
        elif kind == "J":
            del self._lines[self._row][self._column :]
            del self._lines[self._row + 1 :]
        elif kind not in "mhl":
            raise AssertionError(f"unknown sequence ESC [ {args} {kind}")
