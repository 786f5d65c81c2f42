"""Cuts a template into tokens: the text between actions, and what is in them."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from lmd.gotemplate.errors import TemplateSyntax, position

KEYWORDS = frozenset({"block", "break", "continue", "define", "else", "end", "if", "range", "template", "with"})

_SPACES = " \t\r\n"
_SPACE_RUN = re.compile(r"[ \t\r\n]+")
_WORD = re.compile(r"\w+")
# Anything with the beginning of a number; whether it is one is found when it is read.
_NUMBER = re.compile(
    r"[+-]?(?:0[xX][0-9a-fA-F_]*(?:\.[0-9a-fA-F_]*)?(?:[pP][+-]?[0-9_]*)?|0[oO][0-7_]*|0[bB][01_]*"
    r"|[0-9_]*(?:\.[0-9_]*)?(?:[eE][+-]?[0-9_]*)?)i?"
)
_QUOTED = {
    '"': (re.compile(r'"(?:[^"\\\n]|\\[^\n])*"'), "unterminated quoted string"),
    "'": (re.compile(r"'(?:[^'\\\n]|\\[^\n])*'"), "unterminated character constant"),
    "`": (re.compile(r"`[^`]*`"), "unterminated raw quoted string"),
}
# What may follow a name or a field, beside spaces and the end of the action.
_TERMINATORS = frozenset(".,|:)(")


class Kind(enum.Enum):
    """What a token is."""

    TEXT = "text"
    OPEN = "{{"
    CLOSE = "}}"
    SPACE = "space"
    NAME = "name"
    KEYWORD = "keyword"
    FIELD = "field"
    DOT = "."
    VARIABLE = "variable"
    STRING = "string"
    CHARACTER = "character"
    NUMBER = "number"
    BOOL = "true or false"
    NIL = "nil"
    ASSIGN = "="
    DECLARE = ":="
    PIPE = "|"
    LEFT = "("
    RIGHT = ")"
    OTHER = "other"
    END = "end"


_SINGLE = {"=": Kind.ASSIGN, "|": Kind.PIPE, "(": Kind.LEFT, ")": Kind.RIGHT}
_QUOTED_KINDS = {'"': Kind.STRING, "`": Kind.STRING, "'": Kind.CHARACTER}


@dataclass(frozen=True, slots=True)
class Token:
    """A token; *text* of what is outside of actions is trimmed as its neighbours ask."""

    kind: Kind
    text: str
    offset: int

    def __str__(self) -> str:
        """Return how messages name it."""
        if self.kind is Kind.END:
            return "the end of the template"
        shown = self.text if len(self.text) <= 20 else self.text[:20] + "…"
        return f'"{shown}"'


def tokens(text: str) -> Iterator[Token]:
    """Yield the tokens of a template, the last of which is `END`.

    Raises:
        TemplateSyntax: at the first place that can be none.
    """
    return _Lexer(text).run()


class _Lexer:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._closed_with_trim = False

    def run(self) -> Iterator[Token]:
        text = self._text
        trim = False
        while True:
            start = self._at
            if trim:
                start += len(_matched(_SPACE_RUN, text, start))
            found = text.find("{{", self._at)
            until = len(text) if found < 0 else found
            trims_left = found >= 0 and text[found + 2 : found + 3] == "-" and text[found + 3 : found + 4] in _WHITE
            piece = text[start:until]
            if trims_left:
                piece = piece.rstrip(_SPACES)
            if piece:
                yield Token(Kind.TEXT, piece, start)
            if found < 0:
                yield Token(Kind.END, "", len(text))
                return
            # The space after the trim marker stays: it is a space in the action.
            self._at = found + (3 if trims_left else 2)
            after_space = self._at + 1 if trims_left else self._at
            if text.startswith("/*", after_space):
                trim = self._comment(after_space)
                continue
            yield Token(Kind.OPEN, "{{", found)
            self._at = after_space
            yield from self._action(found)
            trim = self._closed_with_trim

    def _comment(self, start: int) -> bool:
        """Skip a comment; return whether the text after it is trimmed."""
        end = self._text.find("*/", start + 2)
        if end < 0:
            self._fail("unclosed comment", start)
        self._at = end + 2
        size = self._close_size()
        if not size:
            self._fail("comment ends before closing delimiter", start)
        self._at += size
        return size > 2

    def _close_size(self) -> int:
        """Return the length of the closing delimiter that is here, with its trim marker; 0 when there is none."""
        if self._text.startswith("}}", self._at):
            return 2
        if self._text.startswith("-}}", self._at + 1) and self._text[self._at] in _SPACES:
            return 4
        return 0

    def _action(self, opened: int) -> Iterator[Token]:
        text = self._text
        lefts: list[int] = []
        while True:
            start = self._at
            if size := self._close_size():
                if lefts:
                    self._fail("unclosed left paren", lefts[-1])
                self._at += size
                self._closed_with_trim = size > 2
                yield Token(Kind.CLOSE, "}}", start)
                return
            if start >= len(text):
                self._fail("unclosed action", opened)
            token = self._token(start)
            self._at = start + len(token.text)
            if token.kind is Kind.LEFT:
                lefts.append(start)
            elif token.kind is Kind.RIGHT:
                if not lefts:
                    self._fail("unexpected right paren", start)
                lefts.pop()
            yield token

    def _token(self, start: int) -> Token:
        text = self._text
        first = text[start]
        if first in _SPACES:
            run = _matched(_SPACE_RUN, text, start)
            # The last of them belongs to a trim marker.
            if text.startswith("-}}", start + len(run)):
                run = run[:-1]
            return Token(Kind.SPACE, run, start)
        if first in _SINGLE:
            return Token(_SINGLE[first], first, start)
        if first == ":":
            if not text.startswith(":=", start):
                self._fail("expected :=", start)
            return Token(Kind.DECLARE, ":=", start)
        if first in _QUOTED:
            pattern, why = _QUOTED[first]
            found = pattern.match(text, start)
            if found is None:
                self._fail(why, start)
            return Token(_QUOTED_KINDS[first], found[0], start)
        if first == "$" or (first == "." and not text[start + 1 : start + 2].isdecimal()):
            return self._field_or_variable(start)
        if first in "+-." or first in "0123456789":
            number = _matched(_NUMBER, text, start)
            if number in "+-" or _WORD.match(text, start + len(number)):
                self._fail(f'bad number syntax: "{text[start : start + max(len(number), 1)]}"', start)
            return Token(Kind.NUMBER, number, start)
        if _WORD.match(first):
            word = _matched(_WORD, text, start)
            self._terminated(start + len(word))
            return Token(_kind_of(word), word, start)
        if first.isascii() and first.isprintable():
            return Token(Kind.OTHER, first, start)
        self._fail(f"unrecognized character in action: U+{ord(first):04X}", start)

    def _field_or_variable(self, start: int) -> Token:
        found = _WORD.match(self._text, start + 1)
        word = self._text[start] + (found[0] if found else "")
        self._terminated(start + len(word))
        if word == ".":
            return Token(Kind.DOT, word, start)
        return Token(Kind.VARIABLE if word[0] == "$" else Kind.FIELD, word, start)

    def _terminated(self, end: int) -> None:
        following = self._text[end : end + 1]
        if following in _WHITE or following in _TERMINATORS or not following or self._text.startswith("}}", end):
            return
        shown = f'"{following}"' if following.isprintable() else f"U+{ord(following):04X}"
        self._fail(f"bad character {shown}", end)

    def _fail(self, message: str, offset: int) -> NoReturn:
        raise TemplateSyntax(message, *position(self._text, offset))


_WHITE = frozenset(_SPACES)


def _matched(pattern: re.Pattern[str], text: str, start: int) -> str:
    found = pattern.match(text, start)
    return found[0] if found else ""


def _kind_of(word: str) -> Kind:
    if word in KEYWORDS:
        return Kind.KEYWORD
    if word in ("true", "false"):
        return Kind.BOOL
    return Kind.NIL if word == "nil" else Kind.NAME
