"""Takes apart what a model says: thoughts, text, calls of functions.

Text comes in pieces, cut anywhere, and goes on as soon as it cannot be the beginning of a marker; what comes out, put
together, does not depend on the cuts. Whitespace around thoughts and calls belongs to neither. What only looks like a
call (an unknown function, broken JSON, no end) is text, as the model wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from lmd.runner.answer_parts import SPACE, Edges, Part, Parts
from lmd.runner.answer_style import AnswerStyle, Calls, Thoughts
from lmd.runner.channels import ChannelAnswer
from lmd.runner.marker_search import held_from
from lmd.runner.tool_bodies import BareBody, Body, make_body
from lmd.runner.tool_calls import Call, State
from lmd.runner.v1 import frames_pb2

__all__ = ["AnswerParser", "Call", "Part"]

# Models write several calls without markers like this.
_GAP = " \t\r\n,;"


class _Parser(Protocol):
    @property
    def called(self) -> bool: ...

    def feed(self, text: str) -> None: ...

    def finish(self, *, cut: bool) -> None: ...


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
        functions = {tool.name: tool.parameters for tool in tools} if parses_calls else {}
        self._parser: _Parser
        if style.in_channels:
            self._parser = ChannelAnswer(self._parts, functions, opened_thinking=opened_thinking)
        else:
            self._parser = _MarkedAnswer(
                self._parts, style, functions, opened_thinking=opened_thinking, parses_thinking=parses_thinking
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
        """Return the rest. *cut*: the answer ended for lack of room; half a marker where one must come says nothing."""
        self._parser.finish(cut=cut)
        return self._parts.take()


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
        functions: Mapping[str, str],
        *,
        opened_thinking: bool,
        parses_thinking: bool,
    ) -> None:
        self._parts = parts
        self._answer = _CallsInText(parts, style.calls if functions else None, functions)
        self._thoughts: _ThoughtsFirst | None = None
        # Where nothing is looked for, thoughts need not be told from the rest.
        if style.thoughts is not None and (parses_thinking or (style.calls is not None and functions)):
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

    def finish(self, *, cut: bool) -> None:
        if self._thoughts is not None:
            self._answer.feed(self._thoughts.finish(cut=cut))
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

    def finish(self, *, cut: bool) -> str:
        """Return what was held back and is not thoughts."""
        held = "".join(self._space) + self._held
        if not self._inside and not self._opened:
            return held
        if self._shows or not cut or not self._inside:
            self._think(held)
        return ""

    def _begin(self, text: str) -> str | None:
        """Look for the opener; return what to go on with, or None while it cannot be told whether it is there."""
        if not self._held:
            body = text.lstrip(SPACE)
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

    def __init__(self, parts: Parts, style: Calls | None, functions: Mapping[str, str]) -> None:
        self.called = False
        self._parts = parts
        self._style = style
        self._functions = functions
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
                    read = "".join(self._read)
                    text, begin, at = read + text, 0, at + len(read)
                at = self._refuse(self._body, text, begin, at)
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
            at = self._refuse(self._body, text, 0, len(text))
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
                self._body, self._opener_size = BareBody(self._functions, lists=not style.opener), 0
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
        self._body, self._opener_size = make_body(style, self._functions), len(style.opener)
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
        self._edges.space = _GAP if self._style.unmarked else SPACE
        self._after_call = True

    def _refuse(self, body: Body, text: str, begin: int, end: int) -> int:
        """Take what looked like a call, up to *end*, as text; return where to look on."""
        at = begin + self._opener_size if body.rescans else end
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
