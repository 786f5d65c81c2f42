"""Reads calls of functions from the JSON in which models write them."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

#: The keys under which models write which function is called.
NAME_KEYS = ("name", "tool_name")
#: The keys under which they write with what.
ARGUMENTS_KEYS = ("arguments", "parameters")

_WHITESPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function; *arguments* is the text of a JSON object."""

    name: str
    arguments: str


class State(enum.Enum):
    """How far the reading of calls has come."""

    OPEN = enum.auto()
    DONE = enum.auto()
    REFUSED = enum.auto()


class NoCall(Exception):
    """Raised when a text is not a call of a known function."""


@dataclass(frozen=True, slots=True)
class _Value:
    """A value, and how it is written."""

    value: Any
    text: str


def read_calls(text: str, names: Collection[str], *, strict: bool) -> list[Call]:
    """Return the calls in an object or a list of objects.

    *strict* takes only objects that say both which function and with what; otherwise no arguments are none.

    Raises:
        NoCall: it is none of these.
    """
    try:
        return [_call_of(members, names, strict=strict) for members in _objects(text)]
    except (ValueError, IndexError, RecursionError) as error:
        raise NoCall(str(error)) from error


def read_arguments(text: str) -> str:
    """Return the text of a JSON object that says what *text* says.

    That is *text* itself where it is one. Line breaks in strings become escapes; an object in a string is taken out.

    Raises:
        NoCall: it is neither an object nor one in a string.
    """
    try:
        return _object_text(_Value(_DECODER.decode(text), text.strip()))
    except (ValueError, RecursionError) as error:
        raise NoCall(str(error)) from error


def _call_of(members: Mapping[str, _Value], names: Collection[str], *, strict: bool) -> Call:
    name = next((members[key].value for key in NAME_KEYS if key in members), None)
    if not isinstance(name, str) or name not in names:
        raise NoCall("no known function")
    arguments = next((members[key] for key in ARGUMENTS_KEYS if key in members), None)
    if arguments is None or arguments.value is None:
        if strict:
            raise NoCall("no arguments")
        return Call(name, "{}")
    return Call(name, _object_text(arguments))


def _object_text(value: _Value) -> str:
    if isinstance(value.value, str):
        inner = value.value.strip()
        value = _Value(_DECODER.decode(inner), inner)
    if not isinstance(value.value, dict):
        raise NoCall("the arguments are no object")
    try:
        json.loads(value.text)
    except ValueError:
        # The decoder is more patient than other readers of JSON.
        return write_arguments(value.value)
    return write_arguments(value.value) if _SURROGATE.search(value.text) else value.text


def write_arguments(arguments: Mapping[str, Any]) -> str:
    """Return arguments as JSON that any reader takes.

    Raises:
        ValueError: a number has no JSON.
    """
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    # Halves of characters can only be written as escapes.
    return json.dumps(arguments) if _SURROGATE.search(text) else text


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Line breaks and tabs in strings are not JSON, but models write them, and what they mean is plain.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse)


def _objects(text: str) -> list[Mapping[str, _Value]]:
    """Return the members of an object, or of each in a list."""
    at = _skip(text, 0)
    if text[at] == "{":
        members, at = _members(text, at)
        found = [members]
    else:
        found = []
        _require(text, at, "[")
        at = _skip(text, at + 1)
        while text[at] != "]":
            members, at = _members(text, at)
            found.append(members)
            at = _next(text, at, "]")
        at += 1
    if _skip(text, at) != len(text) or not found:
        raise NoCall("no calls, or more than that")
    return found


def _members(text: str, at: int) -> tuple[Mapping[str, _Value], int]:
    """Return the members of the object at *at*, each as it is written, and where it ends."""
    _require(text, at, "{")
    members: dict[str, _Value] = {}
    at = _skip(text, at + 1)
    while text[at] != "}":
        _require(text, at, '"')
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        _require(text, at, ":")
        begin = _skip(text, at + 1)
        value, at = _DECODER.raw_decode(text, begin)
        members[key] = _Value(value, text[begin:at])
        at = _next(text, at, "}")
    return members, at + 1


def _next(text: str, at: int, closer: str) -> int:
    """Return where the next of several begins, or the closer stands."""
    at = _skip(text, at)
    if text[at] == closer:
        return at
    _require(text, at, ",")
    return _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    found = _WHITESPACE.match(text, at)
    assert found is not None, "it matches nothing as well"
    return found.end()


def _require(text: str, at: int, character: str) -> None:
    if text[at] != character:
        raise NoCall(f"no {character}")
