"""Where the text of an answer goes: untouched into a pipe, wrapped onto a terminal, or nowhere yet."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from lmd.cli.terminal import cell_width, printable, terminal_size

_WORDS = re.compile(r"\n|[^\S\n]+|\S+")


class Sink(Protocol):
    """Where text is written: a stream, or what stands before one."""

    def write(self, text: str, /) -> object:
        """Write *text*."""

    def flush(self) -> object:
        """Let it out."""


class Body(Protocol):
    """Takes the text of an answer piece by piece."""

    def feed(self, piece: str) -> None:
        """Take the next piece of text."""

    def refresh(self) -> None:
        """Catch up on the screen, when nothing has come for a while."""

    def close(self) -> None:
        """Write what is left; the output ends with a line feed if there was any."""


class RawBody:
    """Writes every piece as it comes; for pipes, and for people who want it so."""

    def __init__(self, stream: Sink, *, clean: bool = False) -> None:
        self._stream = stream
        self._clean = clean
        self._last = "\n"

    def feed(self, piece: str) -> None:
        """Write *piece* at once."""
        text = printable(piece) if self._clean else piece
        self._last = text[-1:] or self._last  # first: Ctrl-C may come as soon as the text is out
        self._stream.write(text)
        self._stream.flush()

    def refresh(self) -> None:
        """Do nothing: nothing is held back."""

    def close(self) -> None:
        """End the last line."""
        if self._last != "\n":
            self._stream.write("\n")
            self._stream.flush()


class WrappedBody:
    """Breaks lines between words at the edge of the terminal. Holds back the word that is being written."""

    def __init__(self, stream: Sink, columns: Callable[[], int] = lambda: terminal_size().columns) -> None:
        self._stream = stream
        self._columns = columns
        self._column = 0
        self._space = ""
        self._word = ""

    def feed(self, piece: str) -> None:
        """Write the words that are complete."""
        for part in _WORDS.findall(printable(piece)):
            if part == "\n":
                self._flush_word()
                self._write("\n")
                self._column, self._space = 0, ""
            elif part.isspace():
                self._flush_word()
                self._space += part.expandtabs(4)
            else:
                self._word += part
                if cell_width(self._word) >= self._columns():
                    self._flush_word()
        self._stream.flush()

    def refresh(self) -> None:
        """Write the held word after all; the rest of it follows on the same line."""
        self._flush_word()
        self._stream.flush()

    def close(self) -> None:
        """Write the last word and end the line."""
        self._flush_word()
        if self._column:
            self._write("\n")
            self._column = 0
        self._stream.flush()

    def _flush_word(self) -> None:
        if not self._word:
            return
        width = cell_width(self._word)
        if self._space and self._column + len(self._space) + width > self._columns():
            self._write("\n" if self._column else "")
            self._column = 0
        elif self._space:
            self._write(self._space)
            self._column += len(self._space)
        self._write(self._word)
        self._column += width
        self._space = self._word = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)


class TitledBody:
    """Puts a line before a text, also before one that stays empty."""

    def __init__(self, body: Body, stream: Sink, title: str) -> None:
        self._body = body
        self._stream = stream
        self._title: str | None = title

    def feed(self, piece: str) -> None:
        """Write the line, once, and *piece*."""
        self._write_title()
        self._body.feed(piece)

    def refresh(self) -> None:
        """Catch up."""
        self._body.refresh()

    def close(self) -> None:
        """Write what is left."""
        self._write_title()
        self._body.close()

    def _write_title(self) -> None:
        if self._title is not None:
            self._stream.write(f"{self._title}\n")
            self._stream.flush()
            self._title = None


class HeldBody:
    """Keeps the text to itself, for `--json`."""

    def feed(self, piece: str) -> None:
        """Drop *piece*; the answer collects it anyway."""

    def refresh(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
