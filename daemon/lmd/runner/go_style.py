"""How a model writes thoughts and calls, found from what its Go template writes around `.Thinking` and `.ToolCalls`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmd.gotemplate.errors import TemplateSyntax
from lmd.gotemplate.nodes import Action, Branch, Node, Pipeline, Range, Template, Text
from lmd.gotemplate.parser import parse
from lmd.gotemplate.survey import pipeline_names

# The process that has the engine reads no longer ones: others wait meanwhile.
_MAX_CHARACTERS = 32 << 10
_LAST_WORD = re.compile(r"(\S+)\s*\Z")
_FIRST_WORD = re.compile(r"\s*(\S+)")
_KEY = re.compile(r'"(\w+)"\s*:\s*"?\Z')
# A tag, or a word.
_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|[^\s<>\[\]{}]+")
_NO_WORD = re.compile(r"\W+")


@dataclass(frozen=True, slots=True)
class GoMarks:
    """What a template writes.

    Attributes:
        thoughts: what is before and after thoughts; None when nothing is.
        calls: what is before and after calls; both may be empty. None when the template writes no calls.
        listed: the calls are in one JSON list.
        name_key: the key of a function's name.
        arguments_key: the key of its arguments.
    """

    thoughts: tuple[str, str] | None = None
    calls: tuple[str, str] | None = None
    listed: bool = False
    name_key: str = "name"
    arguments_key: str = "arguments"


def marks_of(source: str) -> GoMarks:
    """Return what a template writes around thoughts and calls; nothing when it is long or does not compile."""
    if len(source) > _MAX_CHARACTERS:
        return GoMarks()
    try:
        template = parse(source)
    except TemplateSyntax:
        return GoMarks()
    calls = _calls_body(template.body)
    if calls is None:
        return GoMarks(_thoughts(template))
    pieces = list(_pieces((calls,)))
    opener = _before_first(pieces).partition("{")[0].strip()
    listed = opener.endswith("[")
    opener = opener.removesuffix("[").rstrip()
    return GoMarks(
        _thoughts(template),
        (opener, _closer(opener, _after_last(pieces))),
        listed,
        _key_before(pieces, "Name", "name"),
        _key_before(pieces, "Arguments", "arguments"),
    )


_Piece = str | frozenset[str]


def _pieces(nodes: Sequence[Node]) -> Iterator[_Piece]:
    """Yield what nodes write, in order: texts, and for actions the names that they read."""
    for node in nodes:
        if isinstance(node, Text):
            yield node.text
        elif isinstance(node, Action):
            if not node.pipeline.variables:
                yield frozenset(pipeline_names(node.pipeline))
        elif isinstance(node, Branch | Range):
            yield from _pieces(node.body)
            yield from _pieces(node.otherwise)


def _calls_body(nodes: Sequence[Node]) -> Node | None:
    """Return the first statement that is about the calls of a turn: `if`, `with` or `range`."""
    for node in nodes:
        if not isinstance(node, Branch | Range):
            continue
        if _reads(node.pipeline, "ToolCalls"):
            # What is in an `else` is about other turns.
            return Branch(False, node.pipeline, node.body, ())
        if (found := _calls_body(node.body) or _calls_body(node.otherwise)) is not None:
            return found
    return None


def _reads(pipeline: Pipeline, name: str) -> bool:
    return name in pipeline_names(pipeline)


def _before_first(pieces: Sequence[_Piece]) -> str:
    texts: list[str] = []
    for piece in pieces:
        if not isinstance(piece, str):
            break
        texts.append(piece)
    return "".join(texts)


def _after_last(pieces: Sequence[_Piece]) -> str:
    texts: list[str] = []
    for piece in reversed(pieces):
        if not isinstance(piece, str):
            break
        texts.insert(0, piece)
    return "".join(texts)


def _closer(opener: str, after: str) -> str:
    """Return the marker after calls: what is like the one before them. Others end the turn."""
    word = _NO_WORD.sub("", opener)
    for found in _MARK.finditer(after):
        if word and word.lower() in _NO_WORD.sub("", found[0]).lower():
            return found[0]
    return ""


def _key_before(pieces: Sequence[_Piece], name: str, usual: str) -> str:
    for number, piece in enumerate(pieces):
        before = pieces[number - 1] if number else ""
        if not isinstance(piece, str) and name in piece and isinstance(before, str):
            found = _KEY.search(before)
            return found[1] if found else usual
    return usual


def _thoughts(template: Template) -> tuple[str, str] | None:
    pieces = list(_pieces(template.body))
    for before, piece, after in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if isinstance(piece, str) or "Thinking" not in piece:
            continue
        opener = _LAST_WORD.search(before) if isinstance(before, str) else None
        closer = _FIRST_WORD.match(after) if isinstance(after, str) else None
        if opener and closer:
            return opener[1], closer[1]
    return None
