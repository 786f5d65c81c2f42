"""What templates work on: Go's values as Python's, and which of them are true.

nil, and what a map has for a key that is not in it, is None, strings are `str` (bytes that are no UTF-8 as surrogates),
numbers `int` and `float`, slices `list` and `tuple`, maps `dict` with text as keys, structs `Struct`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmd.gotemplate.to_json import to_json

Value = object


@dataclass(frozen=True, slots=True)
class Struct:
    """A Go struct.

    Attributes:
        type: how messages call its type.
        fields: by name, in order. Others are an error, not nothing.
        json: what it is in JSON.
        writes_json: it is written as JSON rather than as its fields.
        typescript: what it is in TypeScript; only a function's parameter has that.
    """

    type: str
    fields: Mapping[str, Value]
    json: Value = None
    writes_json: bool = False
    typescript: str = "any"


class JsonMap(dict[str, Value]):
    """A map that is written as JSON."""

    __slots__ = ()


class JsonList(list[Value]):
    """A slice that is written as JSON."""

    __slots__ = ()


@dataclass(slots=True)
class Budget:
    """What a template may use up, in all of its runs for one prompt.

    Attributes:
        steps: operations, of which a kilobyte of text is one as well.
        bytes: the longest text that it may make, as its output or in a variable.
        written: bytes of output so far.
    """

    steps: int
    bytes: int
    used: int = field(default=0, init=False)
    written: int = field(default=0, init=False)

    def charge(self, steps: int = 1) -> None:
        """Take so many steps. Raises: OverBudget."""
        self.used += steps
        if self.used > self.steps:
            raise OverBudget(f"it takes more than {self.steps} steps")

    def charge_text(self, characters: int) -> None:
        """Take what a text of so many characters costs. Raises: OverBudget."""
        if characters > self.bytes:
            raise OverBudget(f"it makes more than {self.bytes} bytes of text")
        self.charge(1 + (characters >> 10))

    def write(self, size_bytes: int) -> None:
        """Take what is written. Raises: OverBudget."""
        self.written += size_bytes
        if self.written > self.bytes:
            raise OverBudget(f"it renders more than {self.bytes} bytes")


class OverBudget(Exception):
    """Raised when a template has used up what it may."""


class Misuse(Exception):
    """Raised when an operation cannot be done with its values; where is for the caller to say."""


def truth(value: Value) -> bool:
    """Return what `if` makes of a value: false for nil, zero and what is empty."""
    return isinstance(value, Struct) or bool(value)


def go_bytes(text: str) -> bytes:
    """Return the bytes of a string."""
    return text.encode("utf-8", "surrogateescape")


def go_text(data: bytes) -> str:
    """Return the string of bytes."""
    return data.decode("utf-8", "surrogateescape")


def type_name(value: Value) -> str:
    """Return how Go calls the type of a value."""
    if isinstance(value, Struct):
        return value.type
    for kind, name in _TYPE_NAMES:
        if isinstance(value, kind):
            return name
    return "nil"


_TYPE_NAMES: tuple[tuple[type, str], ...] = (
    (bool, "bool"),
    (int, "int"),
    (float, "float64"),
    (str, "string"),
    (list, "[]interface {}"),
    (tuple, "[]interface {}"),
    (dict, "map[string]interface {}"),
)


def json_of(value: Value) -> str:
    """Return what Go's encoder makes of a value."""
    return to_json(_plain(value))


def _plain(value: Value) -> Value:
    if isinstance(value, Struct):
        return value.json
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        # As Go does with maps. What has an order of its own comes in a struct.
        return {key: _plain(value[key]) for key in sorted(value, key=go_bytes)}
    return value
