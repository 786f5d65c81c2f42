"""Reads constants as Go writes them."""

from __future__ import annotations

import re

_SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}
_ESCAPE = re.compile(
    r"\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<o>[0-7]{3})|(?P<s>.))", re.DOTALL
)
_WORDS = {"true": True, "false": False, "nil": None}
_UNDERSCORES = re.compile(r"(?<![0-9a-fA-FxXoObB])_|_(?![0-9a-fA-F])")
_MAX_DIGITS = 400


def read_literal(text: str) -> str | int | float | bool | None:
    """Return what a constant stands for. Text that is no UTF-8 is kept in surrogates (`surrogateescape`).

    Raises:
        ValueError: with what is wrong, when it is none.
    """
    if text in _WORDS:
        return _WORDS[text]
    if text[0] == "`":
        # Go drops them, so that a template means the same with the line ends of other systems.
        return text[1:-1].replace("\r", "")
    if text[0] == '"':
        return _unescaped(text[1:-1], '"', text)
    if text[0] == "'":
        inner = _unescaped(text[1:-1], "'", text)
        if len(inner) != 1:
            raise ValueError(f"malformed character constant: {_cut(text)}")
        code = ord(inner)
        return code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return _number(text)


def _unescaped(inner: str, quote: str, text: str) -> str:
    out = bytearray()
    at = 0
    while at < len(inner):
        next_at = inner.find("\\", at)
        if next_at < 0:
            next_at = len(inner)
        out += inner[at:next_at].encode("utf-8", "surrogateescape")
        if next_at == len(inner):
            break
        found = _ESCAPE.match(inner, next_at)
        escape = _escaped(found, quote) if found else None
        if found is None or escape is None:
            raise ValueError(f"invalid escape in {_cut(text)}")
        out += escape
        at = found.end()
    return out.decode("utf-8", "surrogateescape")


def _escaped(found: re.Match[str], quote: str) -> bytes | None:
    if simple := found["s"]:
        if simple == quote:
            return quote.encode()
        return bytes([_SIMPLE[simple]]) if simple in _SIMPLE else None
    if octal := found["o"]:
        return bytes([int(octal, 8)]) if int(octal, 8) < 256 else None
    if hexadecimal := found["x"]:
        return bytes([int(hexadecimal, 16)])
    code = int(found["u"] or found["U"], 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        return None
    return chr(code).encode()


def _number(text: str) -> int | float:
    if text.endswith("i") and not text.lower().startswith("0x"):
        raise ValueError(f"complex numbers are not supported: {_cut(text)}")
    problem = f'bad number syntax: "{_cut(text)}"'
    if len(text) > _MAX_DIGITS or _UNDERSCORES.search(text):
        raise ValueError(problem)
    plain = text.replace("_", "")
    unsigned = plain.lstrip("+-").lower()
    is_float = "." in unsigned or "p" in unsigned or ("e" in unsigned and not unsigned.startswith("0x"))
    try:
        if is_float:
            if unsigned.startswith("0x") and "p" not in unsigned:
                raise ValueError
            value = float.fromhex(plain) if unsigned.startswith("0x") else float(plain)
        elif len(unsigned) > 1 and unsigned[0] == "0" and unsigned[1].isdecimal():
            return int(plain, 8)
        else:
            number = int(plain, 0)
            if not -(1 << 63) <= number < 1 << 63:
                raise ValueError(f"integer overflow: {_cut(text)}")
            return number
    except (ValueError, OverflowError) as error:
        raise ValueError(str(error) if str(error).startswith("integer overflow") else problem) from None
    if value in (float("inf"), float("-inf")):
        raise ValueError(problem)
    return value


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
