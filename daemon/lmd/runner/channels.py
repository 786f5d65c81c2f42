"""Reads answers that are messages in channels, as gpt-oss writes them.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…

What is in `analysis` is thoughts, what is in other channels is text; a message to `functions.f` is a call. The prompt
has begun the first message, up to its role.

Source: the description of the format in openai/harmony, 2025-08.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from lmd.runner.answer_style import CHANNEL_MARKERS
from lmd.runner.marker_search import held_from
from lmd.runner.tool_calls import Call, NoCall, read_arguments

if TYPE_CHECKING:
    from lmd.runner.answer_parts import Parts

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
# A model may forget the end.
_STARTS = ("<|start|>", "<|channel|>")
_AFTER_CONTENT = re.compile("|".join(map(re.escape, (*_ENDS, *_STARTS))))
_MARKER = re.compile("|".join(map(re.escape, CHANNEL_MARKERS)))
_CHANNEL = re.compile(r"<\|channel\|>\s*([A-Za-z]+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
# A header of which the end is missing, up to the middle of a marker.
_CUT_HEADER = re.compile(
    r"(\s|<\|(start|channel|constrain)\|>|assistant|analysis|commentary|final|json|to=[^\s<]*(?=[\s<]|$))*[a-z]{0,10}(<\|?[a-z]*\|?)?"
)
_FUNCTIONS = "functions."
_MAX_HEADER_CHARACTERS = 256
_MAX_HEADER_WORDS = 6


class _Kind(enum.Enum):
    THOUGHTS = enum.auto()
    TEXT = enum.auto()
    CALL = enum.auto()
    # To somebody who is not known; shown as it is written.
    OTHER = enum.auto()


class ChannelAnswer:
    """Reads one answer."""

    def __init__(self, parts: Parts, names: Collection[str], *, opened_thinking: bool) -> None:
        self.called = False
        self._parts = parts
        self._names = names
        # Of the message that is being read; None while its header is.
        self._kind: _Kind | None = _Kind.THOUGHTS if opened_thinking else None
        self._header = ""
        self._function = ""
        self._content: list[str] = []
        self._held = ""
        # Whether a message of the same kind came before.
        self._said = {_Kind.THOUGHTS: False, _Kind.TEXT: False}
        self._breaks = False

    def feed(self, text: str) -> None:
        """Take more."""
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text):
            if self._kind is not None:
                at = self._go_through_content(text, at)
                continue
            # Whether this is a header depends on all of it, and what is none is read again.
            text, at, self._header = self._header + text[at:] if self._header else text, 0 if self._header else at, ""
            at = self._go_through_header(text, at)

    def finish(self, *, cut: bool) -> None:
        """Take the end."""
        if self._kind is None:
            is_header = _MARKER.search(self._header) is not None and _CUT_HEADER.fullmatch(self._header) is not None
            if not is_header:
                # No header begins like this after all. One without a message says nothing, cut off or not.
                header = self._header
                self._begin(_Kind.TEXT)
                self._take(header)
            return
        self._take(self._held)
        self._end("")

    def _go_through_header(self, text: str, at: int) -> int:
        end = text.find(_MESSAGE, at, at + _MAX_HEADER_CHARACTERS + len(_MESSAGE))
        header = text[at : at + _MAX_HEADER_CHARACTERS + len(_MESSAGE)] if end < 0 else text[at:end]
        if not _may_be_header(header):
            self._begin(_Kind.TEXT)
            # A marker here is text, too: there is no header that it begins.
            marker = _MARKER.match(text, at)
            if marker is None:
                return at
            self._take(marker[0])
            return marker.end()
        if end < 0:
            self._header = header
            return at + len(header)
        self._header = header + _MESSAGE
        self._begin(self._kind_of(header))
        return end + len(_MESSAGE)

    def _kind_of(self, header: str) -> _Kind:
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL.search(header)
        if recipient is not None and recipient[1] != "assistant":
            self._function = recipient[1].removeprefix(_FUNCTIONS)
            return _Kind.CALL if self._function in self._names else _Kind.OTHER
        return _Kind.THOUGHTS if channel is not None and channel[1] == "analysis" else _Kind.TEXT

    def _begin(self, kind: _Kind) -> None:
        """Begin the content of a message."""
        self._kind = kind
        self._breaks = self._said.get(kind, self._said[_Kind.TEXT])
        if kind is _Kind.OTHER:
            self._take(self._header)
        elif kind is _Kind.TEXT or kind is _Kind.THOUGHTS:
            self._header = ""

    def _go_through_content(self, text: str, at: int) -> int:
        found = _AFTER_CONTENT.search(text, at)
        if found is None:
            cut = min(held_from(text, at, marker) for marker in (*_ENDS, *_STARTS))
            self._take(text[at:cut])
            self._held = text[cut:]
            return len(text)
        self._take(text[at : found.start()])
        if found[0] in _STARTS:
            self._end("")
            return found.start()
        self._end(found[0])
        return found.end()

    def _take(self, text: str) -> None:
        """Take content of the message."""
        if not text:
            return
        if self._kind is _Kind.CALL:
            self._content.append(text)
            return
        kind = _Kind.THOUGHTS if self._kind is _Kind.THOUGHTS else _Kind.TEXT
        say = self._parts.think if kind is _Kind.THOUGHTS else self._parts.say
        if self._breaks:
            say("\n\n")
        self._breaks, self._said[kind] = False, True
        say(text)

    def _end(self, marker: str) -> None:
        """Take the end of the message."""
        if self._kind is _Kind.CALL:
            content = "".join(self._content)
            self._content.clear()
            try:
                self._parts.call(Call(self._function, read_arguments(content if content.strip() else "{}")))
                self.called = True
            except NoCall:
                written = self._header + content + marker
                self._begin(_Kind.TEXT)
                self._take(written)
        elif self._kind is _Kind.OTHER:
            self._take(marker)
        self._kind, self._header = None, ""


def _may_be_header(text: str) -> bool:
    """Tell whether a header may begin like this: it has few words, and the first is a marker, a role or a recipient."""
    if held_from(text, 0, _MESSAGE) > _MAX_HEADER_CHARACTERS:
        return False
    text = text.lstrip()
    first = text.split("<", 1)[0].split(None, 1)
    if first and not ("assistant".startswith(first[0]) or "to=".startswith(first[0][:3])):
        return False
    if text.startswith("<") and not any(
        text.startswith(marker) or marker.startswith(text) for marker in CHANNEL_MARKERS
    ):
        return False
    whole = text[: min(held_from(text, 0, marker) for marker in CHANNEL_MARKERS)]
    return len(_MARKER.sub(" ", whole).split()) <= _MAX_HEADER_WORDS
