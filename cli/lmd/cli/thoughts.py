"""Shows what a model thinks before it answers: apart from the answer, so that a pipe gets the answer alone."""

from __future__ import annotations

from typing import Protocol, TextIO

from lmd.cli.bodies import Body, RawBody, WrappedBody
from lmd.cli.terminal import Palette, is_terminal, palette_for

_BEGIN, _END = "--- thinking ---", "--- answer ---"


class Thoughts(Protocol):
    """Takes thoughts piece by piece.

    Attributes:
        visible: whether anything is seen of them.
    """

    visible: bool

    def feed(self, piece: str) -> None:
        """Take the next piece."""

    def end(self, *, answered: bool) -> None:
        """Take that there are no more, and whether the answer begins. Idempotent."""


class HiddenThoughts:
    """Shows none."""

    visible = False

    def feed(self, piece: str) -> None:
        """Drop *piece*; the answer collects it anyway."""

    def end(self, *, answered: bool) -> None:
        """Do nothing."""


class ShownThoughts:
    """Writes thoughts between two lines that say so, faint on a terminal that can do that."""

    visible = True

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._palette = palette_for(stream)
        self._body: Body | None = None

    def feed(self, piece: str) -> None:
        """Write *piece*."""
        if self._body is None:
            faint = _Faint(self._stream, self._palette)
            self._body = WrappedBody(faint) if is_terminal(self._stream) else RawBody(faint)
            self._line(_BEGIN)
        self._body.feed(piece)

    def end(self, *, answered: bool) -> None:
        """Write what is left, and whether the answer begins."""
        if self._body is not None:
            self._body.close()
            self._body = None
            if answered:
                self._line(_END)

    def _line(self, text: str) -> None:
        self._stream.write(f"{self._palette.faint(text)}\n")
        self._stream.flush()


class _Faint:
    """Makes what is written to a stream less important than what stands beside it."""

    def __init__(self, stream: TextIO, palette: Palette) -> None:
        self._stream = stream
        self._palette = palette

    def write(self, text: str, /) -> None:
        self._stream.write(self._palette.faint(text))

    def flush(self) -> None:
        self._stream.flush()
