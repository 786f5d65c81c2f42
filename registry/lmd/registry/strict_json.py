"""JSON that nobody vouches for, read with caps; and the one canonical way to write it."""

from __future__ import annotations

import json
from typing import NoReturn

from lmd.registry.errors import InvalidRequest

MAX_BYTES = 4 * 1024**2
MAX_DEPTH = 16
MAX_ITEMS = 65_536
"""Values of all objects and arrays together."""

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def dump(value: Json | dict[str, object]) -> bytes:
    """Write *value* so that equal values always give the same bytes: sorted keys, no spaces, UTF-8.

    Raises ValueError for numbers JSON does not have, and for text that is not Unicode.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def load_object(data: bytes, what: str) -> dict[str, Json]:
    """Read a JSON object of at most 4 MiB.

    Refused besides what is not JSON: keys that are there twice (readers differ in which one counts), NaN and
    infinities, integers beyond 64 bits, lone surrogates, and nesting beyond 16 levels.

    Raises:
        InvalidRequest: with *what* as field.
    """
    if len(data) > MAX_BYTES:
        fail(what, f"has {len(data)} bytes; at most {MAX_BYTES} are allowed")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        detail = str(error) if isinstance(error, _Refused) else "it does not parse"
        raise InvalidRequest(f"{what} is not acceptable JSON: {detail}", field=what) from None
    if not isinstance(value, dict):
        fail(what, "is not an object")
    _check(value, what)
    return value


def fail(what: str, why: str) -> NoReturn:
    """Raise InvalidRequest about *what*."""
    raise InvalidRequest(f"{what} {why}", field=what)


class _Refused(ValueError):
    """JSON that parses, but is refused all the same."""


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    items = dict(pairs)
    if len(items) != len(pairs):
        raise _Refused("a key is there twice")
    return items


def _no_constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is no JSON number")


def _check(root: Json, what: str) -> None:
    """Walk without recursion, so that depth is ours to bound."""
    pending: list[tuple[Json, int]] = [(root, 1)]
    seen = 0
    while pending:
        value, depth = pending.pop()
        seen += 1
        if seen > MAX_ITEMS:
            fail(what, f"has more than {MAX_ITEMS} values")
        if isinstance(value, str):
            _check_text(value, what)
        elif isinstance(value, int) and abs(value) >= 2**63:
            fail(what, "has an integer beyond 64 bits")
        elif isinstance(value, float) and value in (float("inf"), float("-inf")):
            fail(what, "has a number beyond what a double holds")
        elif isinstance(value, list | dict):
            if depth > MAX_DEPTH:
                fail(what, f"is nested more than {MAX_DEPTH} levels deep")
            if isinstance(value, dict):
                for key in value:
                    _check_text(key, what)
            pending.extend((item, depth + 1) for item in (value.values() if isinstance(value, dict) else value))


def _check_text(text: str, what: str) -> None:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        fail(what, "has text that is not Unicode")
