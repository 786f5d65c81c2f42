"""The text of a model reference while it is parsed: refusals that name a position."""

from __future__ import annotations

import unicodedata
from typing import NoReturn

from lmd.registry.errors import InvalidRef

MAX_REF_CHARS = 300
MAX_PATH_CHARS = 4096
_HINT = (
    "a reference looks like `llama3`, `me/llama3:8b`, `hf.co/org/repo:Q4_K_M`, `https://host/x.gguf` or `/path/x.gguf`"
)


class RefText:
    """The text being parsed, for messages with positions."""

    def __init__(self, text: str) -> None:
        self._text = text

    def fail(self, position: int, why: str, hint: str = _HINT) -> NoReturn:
        """Raise InvalidRef for the character at *position* (from 0)."""
        shown = ascii(self._text[:80])[1:-1] + ("…" if len(self._text) > 80 else "")
        raise InvalidRef(
            f"`{shown}` is not a model reference: at position {position + 1}, {why}", ref=self._text, hint=hint
        )

    def check_characters(self) -> None:
        """Refuse what no kind of reference may contain."""
        text = self._text
        if not text:
            raise InvalidRef("the model reference is empty", ref=text, hint=_HINT)
        for position, char in enumerate(text[: MAX_PATH_CHARS + 1]):
            category = unicodedata.category(char)
            if category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
                self.fail(position, f"U+{ord(char):04X} is a control or invisible character")
            if char == "\\":
                self.fail(position, "`\\` is not allowed; write `/`")
        if len(text) > MAX_PATH_CHARS:
            self.fail(MAX_PATH_CHARS, f"it goes on beyond {MAX_PATH_CHARS} characters")

    def check_ascii(self, body: str) -> None:
        """Refuse characters outside of ASCII."""
        for position, char in enumerate(body):
            if not char.isascii():
                self.fail(position, f"`{ascii(char)[1:-1]}` is not a plain ASCII character")

    def check_part(
        self, start: int, part: str, what: str, allowed: frozenset[str], max_chars: int, hint: str = _HINT
    ) -> None:
        """Refuse a part that is empty, too long, or has other characters than *allowed*."""
        if not part:
            self.fail(start, f"the {what} is empty", hint)
        for position, char in enumerate(part, start):
            if char not in allowed:
                self.fail(position, f"`{ascii(char)[1:-1]}` is not allowed in a {what}", hint)
        if not (part[0].isalnum() or part[0] == "_"):
            self.fail(start, f"a {what} starts with a letter, a digit or `_`", hint)
        if ".." in part:
            self.fail(start + part.index(".."), f"`..` is not allowed in a {what}", hint)
        if len(part) > max_chars:
            self.fail(start + max_chars, f"the {what} is longer than {max_chars} characters", hint)

    def check_length(self, length: int) -> None:
        """Refuse names beyond the limit."""
        if length > MAX_REF_CHARS:
            self.fail(MAX_REF_CHARS, f"it goes on beyond {MAX_REF_CHARS} characters")
