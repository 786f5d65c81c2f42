"""What an answer is put together from while it is read."""

from __future__ import annotations

from dataclasses import dataclass

from lmd.runner.tool_calls import Call

#: What counts as whitespace: what models put around thoughts and calls.
SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer: one of these."""

    thinking: str = ""
    text: str = ""
    call: Call | None = None


class Parts:
    """Collects parts; neighbours of the same kind become one."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._open: list[str] = []
        self._thinking = False

    def think(self, text: str) -> None:
        """Add thoughts."""
        self._add(text, thinking=True)

    def say(self, text: str) -> None:
        """Add text."""
        self._add(text, thinking=False)

    def call(self, call: Call) -> None:
        """Add a call."""
        self._close()
        self._parts.append(Part(call=call))

    def take(self) -> list[Part]:
        """Return what was added since the last time."""
        self._close()
        parts, self._parts = self._parts, []
        return parts

    def _add(self, text: str, *, thinking: bool) -> None:
        if not text:
            return
        if thinking != self._thinking:
            self._close()
            self._thinking = thinking
        self._open.append(text)

    def _close(self) -> None:
        if self._open:
            text = "".join(self._open)
            self._parts.append(Part(thinking=text) if self._thinking else Part(text=text))
            self._open.clear()


class Edges:
    """Holds back whitespace at the end of a text, and drops it at the beginning if told to."""

    def __init__(self, *, strips_start: bool) -> None:
        self.strips_start = strips_start
        self.space = SPACE
        self._held: list[str] = []

    def feed(self, text: str) -> str:
        """Return what can go on."""
        if self.strips_start:
            text = text.lstrip(self.space)
        if not text.strip(self.space):
            self._held.append(text)
            return ""
        self.strips_start, self.space = False, SPACE
        body = text.rstrip(SPACE)
        out = "".join([*self._held, body])
        self._held = [text[len(body) :]]
        return out

    def drop(self) -> None:
        """Forget the whitespace that is held back."""
        self._held.clear()

    def flush(self) -> str:
        """Return it."""
        held, self._held = "".join(self._held), []
        return held
