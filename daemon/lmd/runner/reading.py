"""How the answers to a chat are read: what of them are thoughts, calls of functions, and text with its stop texts."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lmd.runner.answer_parser import AnswerParser, Part
from lmd.runner.answer_style import AnswerStyle, style_of
from lmd.runner.text import StopMatcher
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import Vocab


class ParsedStream:
    """Turns the bytes of token after token into parts of an answer, as `TextStream` does into text.

    Stop texts are looked for in what the model says, not in what it thinks or in its calls, and none goes across those.
    """

    def __init__(self, stops: Sequence[str], parser: AnswerParser) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stops
        self._matcher = StopMatcher(stops)
        self._parser = parser
        self.stop = ""

    @property
    def called(self) -> bool:
        """Whether a function was called."""
        return self._parser.called

    def feed(self, piece: bytes) -> list[Part]:
        """Return what is certain now; `stop` is set once a stop text was met."""
        text = self._decoder.decode(piece)
        return self._until_stop(self._parser.feed(text)) if text else []

    def finish(self, *, cut: bool) -> list[Part]:
        """Return what was held back at the end; *cut* as in `TextStream.finish`."""
        if self.stop:
            return []
        tail = "" if cut else self._decoder.decode(b"", final=True)
        parts = self._until_stop([*self._parser.feed(tail), *self._parser.finish(cut=cut)])
        # After a stop text nothing is held.
        if held := self._matcher.flush():
            parts.append(Part(text=held))
        return parts

    def _until_stop(self, parts: Iterable[Part]) -> list[Part]:
        shown: list[Part] = []
        for part in parts:
            if not part.text:
                if held := self._matcher.flush():
                    shown.append(Part(text=held))
                self._matcher = StopMatcher(self._stops)
                shown.append(part)
                continue
            text, self.stop = self._matcher.feed(part.text)
            if text:
                shown.append(Part(text=text))
            if self.stop:
                break
        return shown


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers to one chat are read.

    Attributes:
        style: how the model writes them.
        tools: what it may call.
        markers: the bytes of the special tokens that mark thoughts and calls; other special tokens say nothing.
    """

    style: AnswerStyle
    tools: Sequence[frames_pb2.Tool]
    markers: Mapping[int, bytes]

    def stream(self, stops: Sequence[str], *, opens_thoughts: bool) -> ParsedStream:
        """Return what reads one answer; with *opens_thoughts* the prompt ends inside thoughts."""
        parser = AnswerParser(
            self.style,
            self.tools,
            opened_thinking=opens_thoughts,
            parses_thinking=True,
            parses_calls=bool(self.tools),
        )
        return ParsedStream(stops, parser)


class Readings:
    """Finds how answers to chats are read, for one model."""

    def __init__(self, vocab: Vocab, template: str) -> None:
        self._vocab = vocab
        self._template = template
        self._markers: dict[AnswerStyle, dict[int, bytes]] = {}

    def of(self, chat: frames_pb2.Chat) -> Reading | None:
        """Return how the answers to a chat are read; None when they are text as they come."""
        style = style_of(chat.template or self._template)
        tools = [] if chat.tool_choice == frames_pb2.TOOL_CHOICE_NONE else list(chat.tools)
        if not tools and not style.in_channels:
            # What marks calls is not to be seen when nobody looks for them.
            style = replace(style, calls=None)
        if style.thoughts is None and style.calls is None:
            return None
        if style not in self._markers:
            self._markers[style] = self._vocab.hidden_tokens(style.markers)
        return Reading(style, tools, self._markers[style])
