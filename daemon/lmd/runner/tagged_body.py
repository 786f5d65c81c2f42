"""Reads calls whose arguments are each between tags, and not in one JSON object."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Any

from lmd.runner.json_scanner import JsonScanner, NotJson
from lmd.runner.marker_search import held_from
from lmd.runner.tool_calls import Call, State, write_arguments

_SPACE = " \t\r\n"
_FUNCTION = "<function="
_PARAMETER = "<parameter="
_VALUE_END = "</parameter>"
_FUNCTION_END = "</function>"
_MAX_TAG_CHARACTERS = 256
# Templates write the values of Python's own types as Python does.
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


class _Place(enum.Enum):
    BEFORE_FUNCTION = enum.auto()
    BEFORE_PARAMETER = enum.auto()
    VALUE = enum.auto()
    AFTER = enum.auto()


class TaggedBody:
    """One function between `<function=f>` and `</function>`, each argument between `<parameter=…>` and its end."""

    def __init__(self, functions: Mapping[str, str], closer: str) -> None:
        self.state = State.OPEN
        self.calls: list[Call] = []
        # Once values were read, which may hold anything, it is too late to look for calls in them.
        self.rescans = True
        self._functions = functions
        self._closer = closer
        self._place = _Place.BEFORE_FUNCTION
        self._function = ""
        self._types: Mapping[str, Any] = {}
        self._arguments: dict[str, Any] = {}
        self._tag = ""
        self._parameter = ""
        self._value: list[str] = []
        self._held = ""
        self._scanner: JsonScanner | None = None

    def feed(self, text: str, at: int) -> int:
        """Go on from *at*; return where it is done, or the end of the text."""
        while at < len(text) and self.state is State.OPEN:
            if self._place is _Place.VALUE:
                at = self._go_through_value(text, at)
            elif not self._tag and text[at] in _SPACE:
                at += 1
            else:
                self._tag += text[at]
                at += 1
                self._look_at_tag()
        return at

    def finish(self) -> None:
        """Decide: a function that is complete needs no closer at the end of an answer."""
        self.state = State.DONE if self.calls else State.REFUSED

    def _look_at_tag(self) -> None:
        """Act on a tag that may be complete."""
        tag = self._tag
        if self._place is _Place.AFTER:
            if tag == self._closer:
                self.state = State.DONE
            elif not self._closer.startswith(tag):
                self.state = State.REFUSED
            return
        before = self._place is _Place.BEFORE_FUNCTION
        expected = (_FUNCTION,) if before else (_PARAMETER, _FUNCTION_END)
        if not any(start.startswith(tag) or tag.startswith(start) for start in expected):
            self.state = State.REFUSED
        elif len(tag) > _MAX_TAG_CHARACTERS:
            self.state = State.REFUSED
        elif not tag.endswith(">"):
            return
        elif before:
            self._begin_function(tag[len(_FUNCTION) : -1].strip())
        elif tag == _FUNCTION_END:
            try:
                self.calls = [Call(self._function, write_arguments(self._arguments))]
            except ValueError:
                self.state = State.REFUSED
            self._place, self._tag = _Place.AFTER, ""
        else:
            self._parameter = tag[len(_PARAMETER) : -1].strip()
            self._place, self._tag, self.rescans = _Place.VALUE, "", False

    def _begin_function(self, name: str) -> None:
        if name not in self._functions:
            self.state = State.REFUSED
            return
        self._function = name
        self._types = _types_of(self._functions[name])
        self._place, self._tag = _Place.BEFORE_PARAMETER, ""

    def _go_through_value(self, text: str, at: int) -> int:
        """Look for the end of a value."""
        size = len(self._held)
        text = self._held + text[at:] if size else text
        begin, at, shift = (0, 0, at - size) if size else (at, at, 0)
        self._held = ""
        end = text.find(_VALUE_END, at)
        if end < 0:
            cut = held_from(text, at, _VALUE_END)
            self._add(text[begin:cut])
            self._held = text[cut:]
            return len(text) + shift
        self._add(text[begin:end])
        at = end + len(_VALUE_END)
        if self._scanner is not None and not self._scanner.done:
            # It stands in a string of a JSON value.
            self._add(_VALUE_END)
        else:
            value = "".join(self._value).removeprefix("\n").removesuffix("\n")
            self._arguments[self._parameter] = _read_value(value, self._types.get(self._parameter))
            self._value.clear()
            self._scanner = None
            self._place = _Place.BEFORE_PARAMETER
        return at + shift

    def _add(self, text: str) -> None:
        if not self._value and text.lstrip(_SPACE)[:1] in ("{", "[") and not _is_text(self._types.get(self._parameter)):
            self._scanner = JsonScanner()
        self._value.append(text)
        if self._scanner is not None and not self._scanner.done:
            try:
                self._scanner.feed(text, 0)
            except NotJson:
                self._scanner = None


def _types_of(schema: str) -> Mapping[str, Any]:
    """Return the schemas of a function's parameters."""
    try:
        properties = json.loads(schema or "{}").get("properties", {})
    except (ValueError, AttributeError, RecursionError):
        # The model was shown it all the same.
        return {}
    return properties if isinstance(properties, dict) else {}


def _kinds(schema: Any) -> list[Any]:
    kinds = schema.get("type", []) if isinstance(schema, dict) else []
    return kinds if isinstance(kinds, list) else [kinds]


def _is_text(schema: Any) -> bool:
    """Tell whether a parameter is a string, whatever it looks like."""
    if isinstance(schema, dict) and "type" not in schema:
        values = [schema["const"]] if "const" in schema else schema.get("enum", [])
        return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)
    return "string" in _kinds(schema)


def _read_value(text: str, schema: Any) -> Any:
    """Return what a parameter's text says, which is text where nothing else fits."""
    if _is_text(schema) and not ("null" in _kinds(schema) and text in ("null", "None")):
        return text
    try:
        return json.loads(text, parse_constant=_PYTHON_WORDS.__getitem__)
    except (ValueError, KeyError, RecursionError):
        return _PYTHON_WORDS.get(text.strip(), text)
