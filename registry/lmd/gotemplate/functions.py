"""The functions that templates call. `and` and `or` are not here: they do not look at all of their arguments."""

from __future__ import annotations

import datetime
import html
import itertools
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmd.gotemplate.printing import formatted, joined, shown
from lmd.gotemplate.values import Budget, Misuse, Struct, Value, go_bytes, go_text, json_of, truth, type_name

# Elements of a slice that are copied in one step.
_COPIED_IN_A_STEP = 64


@dataclass(frozen=True, slots=True)
class Builtin:
    """A function, and how many arguments it takes; *most* is None where there is no limit."""

    run: Callable[[Sequence[Value], Budget], Value]
    least: int
    most: int | None


def _kind(value: Value) -> str:
    if isinstance(value, Struct):
        return "struct"
    for type_, kind in ((bool, "bool"), (int, "int"), (float, "float"), (str, "string")):
        if isinstance(value, type_):
            return kind
    return "nil" if value is None else "none"


def _equal_one(one: Value, other: Value) -> bool:
    if one is None or other is None:
        return one is other
    kind, its = _kind(one), _kind(other)
    if kind != its:
        raise Misuse("incompatible types for comparison")
    for value in (one, other):
        if kind == "none" or (kind == "struct" and not _comparable(value)):
            raise Misuse(f"non-comparable type {type_name(value)}")
    return one == other


def _comparable(value: Value) -> bool:
    if isinstance(value, Struct):
        return all(_comparable(item) for item in value.fields.values())
    return not isinstance(value, list | tuple | dict)


def _equal(values: Sequence[Value], budget: Budget) -> bool:
    if len(values) < 2:
        raise Misuse("missing argument for comparison")
    budget.charge(len(values))
    # All are compared until one is equal, and one that cannot be is an error only when it is reached.
    return any(_equal_one(values[0], other) for other in values[1:])


def _less(one: Value, other: Value) -> bool:
    kind, its = _kind(one), _kind(other)
    for name in (kind, its):
        if name in ("nil", "none", "struct"):
            raise Misuse("invalid type for comparison")
    if kind != its:
        raise Misuse("incompatible types for comparison")
    if kind == "bool":
        raise Misuse("invalid type for comparison")
    if isinstance(one, str) and isinstance(other, str):
        return go_bytes(one) < go_bytes(other)
    assert isinstance(one, int | float)
    assert isinstance(other, int | float)
    return one < other


def _len(values: Sequence[Value], _budget: Budget) -> int:
    (value,) = values
    if isinstance(value, str):
        return len(go_bytes(value))
    if isinstance(value, list | tuple | dict):
        return len(value)
    raise Misuse("len of nil pointer" if value is None else f"len of type {type_name(value)}")


def _integer(value: Value, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        shown_type = type_name(value)
        raise Misuse("cannot index slice/array with nil" if value is None else f"{what} with type {shown_type}")
    return value


def _index(values: Sequence[Value], budget: Budget) -> Value:
    item = values[0]
    if item is None:
        raise Misuse("index of untyped nil")
    for key in values[1:]:
        budget.charge()
        if isinstance(item, dict):
            if not isinstance(key, str):
                raise Misuse(f"value has type {type_name(key)}; should be string")
            item = item.get(key)
        elif isinstance(item, list | tuple | str):
            number = _integer(key, "cannot index slice/array")
            sequence = go_bytes(item) if isinstance(item, str) else item
            if not 0 <= number < len(sequence):
                raise Misuse(f"index out of range: {number}")
            item = sequence[number]
        else:
            raise Misuse("index of nil pointer" if item is None else f"can't index item of type {type_name(item)}")
    return item


def _slice(values: Sequence[Value], budget: Budget) -> Value:
    item, *bounds = values
    if item is None:
        raise Misuse("slice of untyped nil")
    if not isinstance(item, str | list | tuple):
        raise Misuse(f"can't slice item of type {type_name(item)}")
    if isinstance(item, str) and len(bounds) == 3:
        raise Misuse("cannot 3-index slice a string")
    sequence = go_bytes(item) if isinstance(item, str) else item
    numbers = [_integer(bound, "cannot index slice/array") for bound in bounds]
    for number in numbers:
        if not 0 <= number <= len(sequence):
            raise Misuse(f"index out of range: {number}")
    for one, other in itertools.pairwise(numbers):
        if one > other:
            raise Misuse(f"invalid slice index: {one} > {other}")
    start = numbers[0] if numbers else 0
    end = numbers[1] if len(numbers) > 1 else len(sequence)
    budget.charge(1 + (end - start) // _COPIED_IN_A_STEP)
    piece = sequence[start:end]
    if isinstance(piece, bytes):
        return go_text(piece)
    # A part of what is written as JSON is written as JSON, too.
    return type(item)(piece) if isinstance(item, list) else piece


def _printf(values: Sequence[Value], budget: Budget) -> str:
    format_ = values[0]
    if not isinstance(format_, str):
        raise Misuse(f"wrong type for value; expected string; got {type_name(format_)}")
    return formatted(format_, values[1:], budget)


def _println(values: Sequence[Value], budget: Budget) -> str:
    text = " ".join(shown(value, budget) for value in values) + "\n"
    budget.charge_text(len(text))
    return text


def _json(values: Sequence[Value], budget: Budget) -> str:
    try:
        text = json_of(values[0])
    except ValueError:
        # Ollama's function does not look at the error of the encoder.
        return ""
    budget.charge_text(len(text))
    return text


def _escapable(values: Sequence[Value], budget: Budget) -> str:
    return joined(["<no value>" if value is None else value for value in values], budget)


def _html(values: Sequence[Value], budget: Budget) -> str:
    text = html.escape(_escapable(values, budget)).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
    text = text.replace("\0", "\ufffd")
    budget.charge_text(len(text))
    return text


def _urlquery(values: Sequence[Value], budget: Budget) -> str:
    text = urllib.parse.quote_plus(go_bytes(_escapable(values, budget)), safe="")
    budget.charge_text(len(text))
    return text


def _date(days: int) -> Builtin:
    def run(values: Sequence[Value], _budget: Budget) -> str:
        # Ollama takes formats, and does not look at them.
        for value in values:
            if not isinstance(value, str):
                raise Misuse(f"wrong type for value; expected string; got {type_name(value)}")
        return (datetime.datetime.now().astimezone() + datetime.timedelta(days=days)).strftime("%Y-%m-%d")

    return Builtin(run, 0, None)


def _typescript(values: Sequence[Value], _budget: Budget) -> str:
    (value,) = values
    return value.typescript if isinstance(value, Struct) else "any"


def _not_equal(values: Sequence[Value], budget: Budget) -> bool:
    return not _equal(values, budget)


BUILTINS = {
    "not": Builtin(lambda values, _: not truth(values[0]), 1, 1),
    "eq": Builtin(_equal, 1, None),
    "ne": Builtin(_not_equal, 2, 2),
    "lt": Builtin(lambda values, _: _less(values[0], values[1]), 2, 2),
    "le": Builtin(lambda values, _: _less(values[0], values[1]) or _equal_one(values[0], values[1]), 2, 2),
    "gt": Builtin(lambda values, _: not _less(values[0], values[1]) and not _equal_one(values[0], values[1]), 2, 2),
    "ge": Builtin(lambda values, _: not _less(values[0], values[1]), 2, 2),
    "len": Builtin(_len, 1, 1),
    "index": Builtin(_index, 1, None),
    "slice": Builtin(_slice, 1, 4),
    "print": Builtin(joined, 0, None),
    "printf": Builtin(_printf, 1, None),
    "println": Builtin(_println, 0, None),
    "html": Builtin(_html, 0, None),
    "urlquery": Builtin(_urlquery, 0, None),
    "json": Builtin(_json, 1, 1),
    "currentDate": _date(0),
    "yesterdayDate": _date(-1),
    "toTypeScriptType": Builtin(_typescript, 1, 1),
}
"""What a function's name stands for."""
