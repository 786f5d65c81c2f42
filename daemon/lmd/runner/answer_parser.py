"""Takes apart what a model says: thoughts, text, calls of functions.

Text comes in pieces, cut anywhere, and goes on as soon as it cannot be the beginning of a marker; what comes out, put
together, does not depend on the cuts. Whitespace around thoughts and calls belongs to neither. What only looks like a
call (an unknown function, broken JSON, no end) is text, as the model wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmd.runner.answer_style import AnswerStyle, Calls, Thoughts
from lmd.runner.tool_bodies import BareBody, Body, State, make_body
from lmd.runner.tool_calls import Call
from lmd.runner.v1 import frames_pb2

__all__ = ["AnswerParser", "Call", "Part"]

_SPACE = " \t\r\n"
# Models write several calls without markers like this.
_GAP = " \t\r\n,;"


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
        self.space = _SPACE
        self._held: list[str] = []

    def feed(self, text: str) -> str:
        """Return what can go on."""
        if self.strips_start:
            text = text.lstrip(self.space)
        if not text.strip(self.space):
            self._held.append(text)
            return ""
        self.strips_start, self.space = False, _SPACE
        body = text.rstrip(_SPACE)
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


class _Parser(Protocol):
    @property
    def called(self) -> bool: ...

    def feed(self, text: str) -> None: ...

    def finish(self) -> None: ...


class AnswerParser:
    """Reads one answer.

    Attributes:
        called: it has called a function.
    """

    def __init__(
        self,
        style: AnswerStyle,
        tools: Sequence[frames_pb2.Tool],
        *,
        opened_thinking: bool,
        parses_thinking: bool,
        parses_calls: bool,
    ) -> None:
        """Read an answer in *style*.

        *opened_thinking*: the prompt ends inside thoughts (`AnswerStyle.opens_thoughts`). Without *parses_thinking*
        thoughts are text, with their markers; without *parses_calls*, or without *tools*, calls are text.
        """
        self._parts = Parts()
        names = frozenset(tool.name for tool in tools) if parses_calls else frozenset[str]()
        self._parser: _Parser = _MarkedAnswer(
            self._parts, style, names, opened_thinking=opened_thinking, parses_thinking=parses_thinking
        )

    @property
    def called(self) -> bool:
        """Whether a function was called."""
        return self._parser.called

    def feed(self, text: str) -> list[Part]:
        """Return what is certain now."""
        if text:
            self._parser.feed(text)
        return self._parts.take()

    def finish(self, *, cut: bool) -> list[Part]:
        """Return the rest. *cut*: the answer ended for lack of room, so it may lack its end."""
        self._parser.finish()
        return self._parts.take()


def held_from(text: str, at: int, marker: str) -> int:
    """Return where text after *at* may be the beginning of a marker that goes on later; its length where none is."""
    for size in range(min(len(marker) - 1, len(text) - at), 0, -1):
        if text.endswith(marker[:size]):
            return len(text) - size
    return len(text)


def _end_of_space(text: str, at: int, space: str) -> int:
    while at < len(text) and text[at] in space:
        at += 1
    return at


class _MarkedAnswer:
    """An answer with thoughts first, between markers, and calls between or among text."""

    def __init__(
        self,
        parts: Parts,
        style: AnswerStyle,
        names: frozenset[str],
        *,
        opened_thinking: bool,
        parses_thinking: bool,
    ) -> None:
        self._parts = parts
        self._answer = _CallsInText(parts, style.calls if names else None, names)
        self._thoughts: _ThoughtsFirst | None = None
        # Where nothing is looked for, thoughts need not be told from the rest.
        if style.thoughts is not None and (parses_thinking or (style.calls is not None and names)):
            self._thoughts = _ThoughtsFirst(
                parts, self._answer, style.thoughts, opened=opened_thinking, shows=not parses_thinking
            )

    @property
    def called(self) -> bool:
        return self._answer.called

    def feed(self, text: str) -> None:
        if self._thoughts is not None:
            rest = self._thoughts.feed(text)
            if rest is None:
                return
            self._thoughts, text = None, rest
        self._answer.feed(text)

    def finish(self) -> None:
        if self._thoughts is not None:
            self._answer.feed(self._thoughts.finish())
        self._answer.finish()


class _ThoughtsFirst:
    """Reads thoughts at the beginning of an answer, if there are any."""

    def __init__(self, parts: Parts, answer: _CallsInText, thoughts: Thoughts, *, opened: bool, shows: bool) -> None:
        self._parts = parts
        self._answer = answer
        self._thoughts = thoughts
        self._opened = opened
        # They are shown in the text of the answer.
        self._shows = shows
        self._inside = False
        self._edges = Edges(strips_start=True)
        self._space: list[str] = []
        self._held = ""

    def feed(self, text: str) -> str | None:
        """Return what comes after the thoughts; None while that has not come."""
        if not self._inside:
            beginning = self._begin(text)
            if beginning is None:
                return None
            text = beginning
            if not self._inside:
                return text
        return self._go_through(text)

    def finish(self) -> str:
        """Return what was held back and is not thoughts."""
        held = "".join(self._space) + self._held
        if not self._inside and not self._opened:
            return held
        self._think(held)
        return ""

    def _begin(self, text: str) -> str | None:
        """Look for the opener; return what to go on with, or None while it cannot be told whether it is there."""
        if not self._held:
            body = text.lstrip(_SPACE)
            self._space.append(text[: len(text) - len(body)])
            text = body
        text, self._held = self._held + text, ""
        opener = self._thoughts.opener
        if text.startswith(opener):
            self._inside = True
            space = "".join(self._space)
            if self._shows:
                self._answer.show(space + opener)
            return text[len(opener) :]
        if opener.startswith(text):
            self._held = text
            return None
        # An opener that the prompt already has may be left out or said again.
        self._inside = self._opened
        return "".join(self._space) + text

    def _go_through(self, text: str) -> str | None:
        text, self._held = self._held + text, ""
        self._space.clear()
        closer = self._thoughts.closer
        end = text.find(closer)
        if end < 0:
            cut = held_from(text, 0, closer)
            self._think(text[:cut])
            self._held = text[cut:]
            return None
        self._think(text[:end])
        rest = text[end + len(closer) :]
        if self._shows:
            self._answer.show(closer)
        else:
            self._answer.strip_start()
        return rest

    def _think(self, text: str) -> None:
        if self._shows:
            self._answer.show(text)
        else:
            self._parts.think(self._edges.feed(text))


class _CallsInText:
    """Reads text with calls in it."""

    def __init__(self, parts: Parts, style: Calls | None, names: frozenset[str]) -> None:
        self.called = False
        self._parts = parts
        self._style = style
        self._names = names
        self._edges = Edges(strips_start=False)
        self._said = False
        self._after_call = False
        # The end of the text may become an opener.
        self._held = ""
        # A call without a marker may begin here.
        self._bare = style is not None and style.bare
        # What reads a call, what it has read, and how much of that was its opener.
        self._body: Body | None = None
        self._read: list[str] = []
        self._opener_size = 0

    def strip_start(self) -> None:
        """Drop whitespace at the beginning."""
        self._edges.strips_start = True

    def show(self, text: str) -> None:
        """Take text in which there are no calls."""
        if self._style is None:
            self._parts.say(text)
        else:
            self._say(text)

    def feed(self, text: str) -> None:
        """Take more."""
        if self._style is None:
            self._parts.say(self._edges.feed(text) + self._edges.flush())
            return
        text, self._held = self._held + text, ""
        at = begin = 0
        while at < len(text):
            if self._body is None:
                begin, at = self._find_call(self._style, text, at)
                if self._body is None:
                    return
            at = self._body.feed(text, at)
            if self._body.state is State.DONE:
                self._call(self._body.calls)
            elif self._body.state is State.REFUSED:
                if self._read:
                    text, begin = "".join([*self._read, text]), 0
                at = self._refuse(text, begin)
        if self._body is not None:
            self._read.append(text[begin:])

    def finish(self) -> None:
        """Take the end."""
        while self._body is not None:
            self._body.finish()
            if self._body.state is State.DONE:
                self._call(self._body.calls)
                break
            text = "".join(self._read)
            at = self._refuse(text, 0)
            self.feed(text[at:])
        self._say(self._held)
        self._held = ""
        if not self._after_call:
            self._parts.say(self._edges.flush())

    def _find_call(self, style: Calls, text: str, at: int) -> tuple[int, int]:
        """Say what comes before the next call; return where that begins and where its body does."""
        if self._bare:
            end = _end_of_space(text, at, self._edges.space)
            self._say(text[at:end])
            at = end
            if at == len(text):
                return at, at
            if text[at] == "{" or (text[at] == "[" and not style.opener):
                self._body, self._opener_size = BareBody(self._names, lists=not style.opener), 0
                return at, at
            self._bare = False
        if not style.opener:
            self._say(text[at:])
            return len(text), len(text)
        begin = text.find(style.opener, at)
        if begin < 0:
            cut = held_from(text, at, style.opener)
            self._say(text[at:cut])
            self._held = text[cut:]
            return cut, len(text)
        self._say(text[at:begin])
        self._body, self._opener_size = make_body(style, self._names), len(style.opener)
        return begin, begin + len(style.opener)

    def _call(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self._parts.call(call)
        self.called = True
        self._body = None
        self._read.clear()
        assert self._style is not None, "there were calls to look for"
        self._bare = self._style.bare
        self._edges.drop()
        self._edges.strips_start = not self._said
        self._edges.space = _GAP if self._bare else _SPACE
        self._after_call = True

    def _refuse(self, text: str, begin: int) -> int:
        """Take what looked like a call as text; return where to look on."""
        at = begin + self._opener_size
        self._body = None
        self._read.clear()
        self._bare = False
        self._say(text[begin:at])
        return at

    def _say(self, text: str) -> None:
        out = self._edges.feed(text)
        if out:
            self._said, self._after_call = True, False
        self._parts.say(out)
