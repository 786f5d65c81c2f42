"""Writes JSON as Go's encoder does: without spaces, what HTML could misread escaped, short numbers."""

from __future__ import annotations

import json
import math
import re

from lmd.gotemplate.numbers import float_text

_ESCAPED = re.compile("[<>&\u2028\u2029]")
_NAMES = {"\\b": "\\u0008", "\\f": "\\u000c"}


def to_json(value: object) -> str:
    """Return the JSON of texts, numbers, lists and of mappings, which keep their order.

    Raises:
        ValueError: for a number that JSON has not.
    """
    parts: list[str] = []
    _write(value, parts)
    return "".join(parts)


def _write(value: object, parts: list[str]) -> None:
    if isinstance(value, str):
        parts.append(json_string(value))
    elif value is None or isinstance(value, bool):
        parts.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, int):
        parts.append(str(value))
    elif isinstance(value, float):
        parts.append(_number(value))
    elif isinstance(value, dict):
        parts.append("{")
        for number, (key, item) in enumerate(value.items()):
            parts.append(("," if number else "") + json_string(key) + ":")
            _write(item, parts)
        parts.append("}")
    elif isinstance(value, list | tuple):
        parts.append("[")
        for number, item in enumerate(value):
            if number:
                parts.append(",")
            _write(item, parts)
        parts.append("]")
    else:
        raise ValueError(f"{type(value).__name__} has no JSON")


def json_string(text: str) -> str:
    """Return a JSON string."""
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    quoted = json.dumps(whole, ensure_ascii=False)
    if "\\b" in quoted or "\\f" in quoted:
        # Not in an escaped backslash: those come in pairs.
        quoted = re.sub(r"\\.", lambda found: _NAMES.get(found[0], found[0]), quoted)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)


def _number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError("JSON has no such number")
    return float_text(value, large=21, small=-6, pad=1)
