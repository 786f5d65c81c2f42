"""Finds where a JSON object or list ends in a stream of text, wherever its pieces are cut.

It follows the grammar of JSON and gives up at the first character that breaks it, so that text that only begins like
JSON is not held back for long. What it finds may still be refused by a real parser (escapes, numbers out of range).
"""

from __future__ import annotations

import enum
import re

_WHITESPACE = re.compile(r"[ \t\r\n]*")
# Line breaks and the like are not JSON, but models write them, and what they mean is plain.
_IN_STRING = re.compile(r'[^"\\]*')
_IN_SCALAR = re.compile(r"[A-Za-z0-9+.\-]*")
_SCALAR = re.compile(r"(-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null)")
_SCALAR_STARTS = frozenset("-0123456789tfn")
_MAX_SCALAR_CHARACTERS = 1_000
_MAX_DEPTH = 100


class NotJson(Exception):
    """Raised when a text is not JSON, or is not what is looked for."""


class _Expect(enum.Enum):
    VALUE = enum.auto()
    VALUE_OR_END = enum.auto()
    KEY = enum.auto()
    KEY_OR_END = enum.auto()
    COLON = enum.auto()
    COMMA_OR_END = enum.auto()


class JsonScanner:
    """Follows one object or list.

    Attributes:
        done: it has ended.
    """

    def __init__(self) -> None:
        self.done = False
        self._stack: list[str] = []
        self._expect = _Expect.VALUE
        self._string: list[str] | None = None
        self._escaped = False
        self._is_key = False
        self._scalar = ""

    def feed(self, text: str, at: int) -> int:
        """Go on from *at* and return where the object or list ends, or the end of the text if it does not.

        Raises:
            NotJson: it is none.
        """
        while at < len(text) and not self.done:
            if self._string is not None:
                at = self._go_through_string(text, at)
            elif self._scalar:
                at = self._go_through_scalar(text, at)
            else:
                found = _WHITESPACE.match(text, at)
                at = found.end() if found else at
                if at < len(text):
                    self._take(text[at])
                    at += 1
        return at

    def saw_key(self, depth: int, key: str) -> None:
        """Receive the key of a member as it is written; *depth* is 1 in the outermost object or list."""

    def saw_string(self, depth: int, value: str) -> None:
        """Receive a string as it is written that is a value in an object or list."""

    def saw_start(self, depth: int, character: str) -> None:
        """Receive the first character of a value in an object or list; the outermost has depth 0."""

    def watches(self, depth: int) -> bool:
        """Tell whether strings at a depth are to be received; others are not kept."""
        return False

    def _go_through_string(self, text: str, at: int) -> int:
        assert self._string is not None, "in a string"
        begin = at
        if self._escaped:
            self._escaped = False
            at += 1
        found = _IN_STRING.match(text, at)
        at = found.end() if found else at
        if self.watches(len(self._stack)):
            self._string.append(text[begin:at])
        if at == len(text):
            return at
        if text[at] == "\\":
            self._escaped = True
            if self.watches(len(self._stack)):
                self._string.append("\\")
            return at + 1
        content, self._string = "".join(self._string), None
        if self._is_key:
            self._expect = _Expect.COLON
            if self.watches(len(self._stack)):
                self.saw_key(len(self._stack), content)
        else:
            self._expect = _Expect.COMMA_OR_END
            if self.watches(len(self._stack)):
                self.saw_string(len(self._stack), content)
        return at + 1

    def _go_through_scalar(self, text: str, at: int) -> int:
        found = _IN_SCALAR.match(text, at)
        end = found.end() if found else at
        self._scalar += text[at:end]
        if len(self._scalar) > _MAX_SCALAR_CHARACTERS:
            raise NotJson("a number is too long")
        if end < len(text):
            if _SCALAR.fullmatch(self._scalar) is None:
                raise NotJson("no number, true, false or null")
            self._scalar = ""
            self._expect = _Expect.COMMA_OR_END
        return end

    def _take(self, character: str) -> None:
        expect = self._expect
        if character in "]}":
            allowed = {
                "]": (_Expect.VALUE_OR_END, _Expect.COMMA_OR_END),
                "}": (_Expect.KEY_OR_END, _Expect.COMMA_OR_END),
            }
            opened = {"]": "[", "}": "{"}[character]
            if not self._stack or self._stack[-1] != opened or expect not in allowed[character]:
                raise NotJson(f"unexpected {character}")
            self._stack.pop()
            self._expect = _Expect.COMMA_OR_END
            self.done = not self._stack
        elif expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            self._start_value(character)
        elif expect in (_Expect.KEY, _Expect.KEY_OR_END) and character == '"':
            self._string, self._is_key = [], True
        elif expect is _Expect.COLON and character == ":":
            self._expect = _Expect.VALUE
        elif expect is _Expect.COMMA_OR_END and character == ",":
            self._expect = _Expect.KEY if self._stack[-1] == "{" else _Expect.VALUE
        else:
            raise NotJson(f"unexpected {character}")

    def _start_value(self, character: str) -> None:
        self.saw_start(len(self._stack), character)
        if character in "{[":
            if len(self._stack) == _MAX_DEPTH:
                raise NotJson("nested too deeply")
            self._stack.append(character)
            self._expect = _Expect.KEY_OR_END if character == "{" else _Expect.VALUE_OR_END
        elif not self._stack:
            raise NotJson("neither an object nor a list")
        elif character == '"':
            self._string, self._is_key = [], False
        elif character in _SCALAR_STARTS:
            self._scalar = character
        else:
            raise NotJson(f"unexpected {character}")
