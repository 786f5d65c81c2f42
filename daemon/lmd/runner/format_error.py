"""The one error of formats, and the engine's error texts turned into sentences.

llguidance reports what it refuses as text for its own developers. `explain` turns the texts of version 1.9 into a
sentence that says what is wrong and what to do; a text that it does not know is passed on with its first line, so that
a new release makes errors less helpful but hides none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping


class FormatError(Exception):
    """Raised when a format cannot be honoured; its text is one sentence for the user."""


_CARET = re.compile(
    r"regex parse error:\n {4}(?P<pattern>[^\n]*)\n {4}(?P<before> *)\^+[^\n]*\nerror: (?P<problem>[^\n]*)"
)
_LOOK = re.compile(r"lookarounds not supported yet; (?P<kind>\w+) in regex /(?P<pattern>.*)/", re.DOTALL)
_UNSATISFIABLE = re.compile(r"Unsatisfiable schema: (?P<why>[^\n]*)")
_NOT_DISJOINT = re.compile(r"patternProperty regexes /(?P<one>.*)/ and /(?P<other>.*)/ are not disjoint")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "/": "\\/"}
_LOOK_KINDS = {"WordUnicode": r"\b", "WordUnicodeNegate": r"\B", "WordAscii": r"\b", "WordAsciiNegate": r"\B"}
# What llguidance says when one of its limits is reached, at once or while text is generated.
_TOO_MUCH = (
    "too many",
    "too large",
    "too complex",
    "too big",
    "too deeply",
    "parsertoocomplex",
    "lexertoocomplex",
    "exceeds",
    "max is",
    "unable to determine",
    "compiled regex",
    "fuel",
)


def explain(what: str, error: str, patterns: Mapping[str, str] | None = None) -> FormatError:
    """Return the error to raise for llguidance's *error* about *what* ("the schema").

    *patterns* holds the regular expressions in it, each with words for where it stands.
    """
    quoted = {"".join(_quote(pattern)): pattern for pattern in patterns or {}}
    if (match := _CARET.search(error)) is not None:
        pattern = quoted.get(match["pattern"], match["pattern"])
        position = _position(pattern, len(match["before"]))
        where = (patterns or {}).get(pattern, what)
        return FormatError(f"{where} is no usable regular expression: {match['problem']} at character {position}")
    if (match := _LOOK.search(error)) is not None:
        pattern = quoted.get(match["pattern"], match["pattern"])
        where = (patterns or {}).get(pattern, what)
        part = _LOOK_KINDS.get(match["kind"], "an anchor (^ or $)")
        return FormatError(f"{where} has {part} where it cannot be used: only ^ first and $ last are supported")
    if (match := _UNSATISFIABLE.search(error)) is not None:
        return FormatError(f"no value can satisfy {what}: {_plain(match['why'])}")
    if (match := _NOT_DISJOINT.search(error)) is not None:
        return FormatError(
            f"the names that 'patternProperties' matches must be told apart, but {match['one']!r} and "
            f"{match['other']!r} both match some; join them or make them exclude each other"
        )
    if "min/maxProperties only supported" in error:
        return FormatError(
            "'minProperties' and 'maxProperties' are supported only when 'required' names all 'properties'; "
            "name them there, or leave the bound out"
        )
    if "oneOf constraints" in error:
        return FormatError(
            "'oneOf' is supported only when its alternatives exclude each other by type, by constant, or by a required "
            "property with different constants; use 'anyOf' if a value may fit several"
        )
    if "circular references with sibling keys" in error:
        return FormatError("a '$ref' that leads back to itself cannot have other keywords beside it; move them there")
    if "float range" in error or "integer range" in error:
        return FormatError("the bounds of a number leave no value, or none that can be written without an exponent")
    if "NoExtension" in error:
        return FormatError(f"nothing can satisfy {what}; look for parts of it that exclude each other")
    if any(words in error.lower() for words in _TOO_MUCH):
        return FormatError(
            f"{what} is too complex; use smaller repeat counts, fewer alternatives, or a simpler pattern"
        )
    return FormatError(f"{what} cannot be used: {_plain(error)}")


def _quote(pattern: str) -> Iterator[str]:
    """Yield each character of a pattern as llguidance writes it between slashes."""
    escaped = False
    for character in pattern:
        short = _SHORT.get(character)
        if short is None:
            yield character
        else:
            yield short[1:] if escaped else short
        escaped = character == "\\" and not escaped


def _position(pattern: str, offset: int) -> int:
    """Return which character of *pattern*, counted from 1, stands at *offset* in its quoted form."""
    position = 1
    for chunk in _quote(pattern):
        offset -= len(chunk)
        if offset < 0:
            break
        position += 1
    return position


def _plain(text: str) -> str:
    """Return the first line, short and without a full stop."""
    line = text.strip().split("\n", 1)[0].strip().rstrip(".")
    line = re.sub(r"Regex is empty: .*", "the pattern matches nothing that the other keywords allow", line)
    return line if len(line) <= 300 else line[:297] + "…"
