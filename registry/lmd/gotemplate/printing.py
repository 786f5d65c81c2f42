"""Writes values as Go's fmt does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lmd.gotemplate.numbers import float_text
from lmd.gotemplate.values import (
    Budget,
    JsonList,
    JsonMap,
    Misuse,
    Struct,
    Value,
    go_bytes,
    go_text,
    json_of,
    type_name,
)

_DIRECTIVE = re.compile(r"%([-+# 0]*)(\*|\d*)(?:\.(\*|\d*))?(\[)?(.)?", re.DOTALL)
#: Go writes `%!(BADWIDTH)` for wider ones, which no prompt has.
_MAX_WIDTH = 10_000


def shown(value: Value, budget: Budget) -> str:
    """Return a value as `%v` writes it, at the top: nil as `<nil>`."""
    parts: list[str] = []
    _show(value, parts, budget)
    text = "".join(parts)
    budget.charge_text(len(text))
    return text


def _show(value: Value, parts: list[str], budget: Budget) -> None:
    if isinstance(value, str):
        parts.append(value)
    elif value is None:
        parts.append("<nil>")
    elif isinstance(value, bool):
        parts.append("true" if value else "false")
    elif isinstance(value, float):
        parts.append(float_text(value))
    elif isinstance(value, JsonMap | JsonList) or (isinstance(value, Struct) and value.writes_json):
        parts.append(json_of(value))
    elif isinstance(value, Struct):
        _show_all(tuple(value.fields.values()), "{", "}", parts, budget)
    elif isinstance(value, list | tuple):
        _show_all(value, "[", "]", parts, budget)
    elif isinstance(value, dict):
        parts.append("map[")
        for number, key in enumerate(sorted(value, key=go_bytes)):
            parts.append(f"{' ' if number else ''}{key}:")
            _show(value[key], parts, budget)
        parts.append("]")
    else:
        parts.append(str(value))
    budget.charge()


def _show_all(items: Sequence[Value], opener: str, closer: str, parts: list[str], budget: Budget) -> None:
    parts.append(opener)
    for number, item in enumerate(items):
        if number:
            parts.append(" ")
        _show(item, parts, budget)
    parts.append(closer)


def joined(values: Sequence[Value], budget: Budget) -> str:
    """Return what `print` writes: spaces only between values neither of which is a string."""
    parts: list[str] = []
    for number, value in enumerate(values):
        if number and not isinstance(value, str) and not isinstance(values[number - 1], str):
            parts.append(" ")
        parts.append(shown(value, budget))
    text = "".join(parts)
    budget.charge_text(len(text))
    return text


def formatted(format_: str, values: Sequence[Value], budget: Budget) -> str:
    """Return what `printf` writes. Mistakes in the format are written out, as Go does it.

    Raises:
        Misuse: for what is not supported: numbered arguments, and widths that are arguments.
    """
    parts: list[str] = []
    used = at = size = 0
    for found in _DIRECTIVE.finditer(format_):
        flags, width, precision, numbered, verb = found.groups()
        parts.append(format_[at : found.start()])
        at = found.end()
        if numbered or "*" in (width, precision):
            raise Misuse(f"printf: {found[0]} is not supported; write the width out, and the arguments in order")
        if max(int(width or 0), int(precision or 0)) > _MAX_WIDTH:
            raise Misuse(f"printf: {found[0][:20]} is wider than {_MAX_WIDTH}")
        if verb == "%":
            parts.append("%")
        elif verb is None:
            parts.append("%!(NOVERB)")
        elif used >= len(values):
            parts.append(f"%!{verb}(MISSING)")
        else:
            directive = _Directive(flags, int(width or 0), int(precision or 0) if precision is not None else None, verb)
            parts.append(directive.write(values[used], budget))
            used += 1
        size += len(parts[-1]) + len(parts[-2])
        budget.charge_text(size)
    parts.append(format_[at:])
    if used < len(values):
        extra = ", ".join(_typed(value, budget) for value in values[used:])
        parts.append(f"%!(EXTRA {extra})")
    text = "".join(parts)
    budget.charge_text(len(text))
    return text


def _typed(value: Value, budget: Budget) -> str:
    return "<nil>" if value is None else f"{type_name(value)}={shown(value, budget)}"


class _Directive:
    """One `%…` of a format."""

    def __init__(self, flags: str, width: int, precision: int | None, verb: str) -> None:
        self._flags = flags
        self._width = width
        self._precision = precision
        self._verb = verb

    def write(self, value: Value, budget: Budget) -> str:
        """Return what it makes of a value; of one that holds others, what it makes of each."""
        if not isinstance(value, JsonMap | JsonList) and not (isinstance(value, Struct) and value.writes_json):
            if isinstance(value, list | tuple):
                return f"[{self._each(value, budget)}]"
            if isinstance(value, Struct):
                return f"{{{self._each(tuple(value.fields.values()), budget)}}}"
            if isinstance(value, dict):
                keys = sorted(value, key=go_bytes)
                return f"map[{' '.join(self._pair(key, value[key], budget) for key in keys)}]"
        if self._verb == "v":
            if "#" in self._flags:
                raise Misuse("printf: %#v is not supported")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            text = shown(value, budget)
            return self._padded(self._signed(text) if number else text, number=number)
        written = self._verbs(value, budget)
        return f"%!{self._verb}({_typed(value, budget)})" if written is None else written

    def _each(self, items: Sequence[Value], budget: Budget) -> str:
        return " ".join("<nil>" if item is None else self.write(item, budget) for item in items)

    def _pair(self, key: str, value: Value, budget: Budget) -> str:
        return f"{self.write(key, budget)}:{self._each((value,), budget)}"

    def _verbs(self, value: Value, budget: Budget) -> str | None:
        if isinstance(value, JsonMap | JsonList | Struct) and self._verb in "sq":
            value = shown(value, budget)
        if isinstance(value, bool):
            return self._padded("true" if value else "false") if self._verb == "t" else None
        if isinstance(value, str):
            return self._string(value)
        if isinstance(value, int):
            return self._integer(value)
        return self._float(value) if isinstance(value, float) else None

    def _string(self, value: str) -> str | None:
        if self._verb == "s":
            return self._padded(value if self._precision is None else value[: self._precision])
        if self._verb == "q":
            return self._padded(quoted(value))
        if self._verb in "xX":
            text = go_bytes(value).hex()
            return self._padded(text.upper() if self._verb == "X" else text)
        return None

    def _integer(self, value: int) -> str | None:
        if self._verb == "c":
            return self._padded(chr(value) if 0 <= value < 0x110000 and not 0xD800 <= value < 0xE000 else "\ufffd")
        writer = _BASES.get(self._verb)
        if writer is None:
            return None
        text = writer(abs(value)).rjust(self._precision or 0, "0")
        return self._padded(self._signed(f"-{text}" if value < 0 else text), number=self._precision is None)

    def _float(self, value: float) -> str | None:
        if self._verb not in "feEgG" or value != value or value in (float("inf"), float("-inf")):
            return None
        if self._precision is None and self._verb in "gG":
            text = float_text(value)
        else:
            text = f"{value:.{6 if self._precision is None else self._precision}{self._verb}}"
        return self._padded(self._signed(text.upper() if self._verb in "EG" else text), number=True)

    def _signed(self, text: str) -> str:
        if text[0] not in "+-":
            return "+" + text if "+" in self._flags else " " + text if " " in self._flags else text
        return text

    def _padded(self, text: str, *, number: bool = False) -> str:
        if "-" in self._flags:
            return text.ljust(self._width)
        if "0" in self._flags and number:
            sign = text[0] if text[0] in "+- " else ""
            return sign + text[len(sign) :].rjust(self._width - len(sign), "0")
        return text.rjust(self._width, "0" if "0" in self._flags and not number and self._verb in "sqvt" else " ")


_BASES: dict[str, Callable[[int], str]] = {
    "d": str,
    "x": lambda value: f"{value:x}",
    "X": lambda value: f"{value:X}",
    "o": lambda value: f"{value:o}",
    "b": lambda value: f"{value:b}",
}


def quoted(text: str) -> str:
    """Return a string as Go source."""
    parts = ['"']
    for character in go_text(go_bytes(text)):
        code = ord(character)
        if character in _ESCAPES:
            parts.append(_ESCAPES[character])
        elif 0xDC80 <= code <= 0xDCFF:
            parts.append(f"\\x{code - 0xDC00:02x}")
        elif character.isprintable():
            parts.append(character)
        else:
            parts.append(f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return "".join(parts) + '"'


_ESCAPES = {
    '"': '\\"',
    "\\": "\\\\",
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
}
