"""Reads what is between the markers of calls, as it comes.

A body takes text until it knows that its calls are complete, or that there are none. It says where it stopped; what
it has refused is the answer's text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from lmd.runner.answer_style import Calls, Form
from lmd.runner.json_scanner import JsonScanner, NotJson
from lmd.runner.tagged_body import TaggedBody
from lmd.runner.tool_calls import ARGUMENTS_KEYS, NAME_KEYS, Call, NoCall, State, read_arguments, read_calls

_SPACE = " \t\r\n"
_GAP = " \t\r\n,;"
_MAX_NAME_CHARACTERS = 256


class Body(Protocol):
    """Reads the calls after an opener.

    Attributes:
        state: how far it is.
        calls: the calls, once it is done.
        rescans: there may be calls in what it has refused.
    """

    state: State
    calls: list[Call]
    rescans: bool

    def feed(self, text: str, at: int) -> int:
        """Go on from *at*; return where it is done, or the end of the text."""

    def finish(self) -> None:
        """Decide: nothing more will come."""


def make_body(style: Calls, functions: Mapping[str, str]) -> Body:
    """Return what reads after the opener; *functions* has the schema of each function's parameters by its name."""
    if style.opener == "[TOOL_CALLS]":
        return NamedBody(functions)
    if style.form is Form.TAGGED:
        return TaggedBody(functions, style.closer)
    return ObjectsBody(functions, style.closer)


class _CallScanner(JsonScanner):
    """Gives up as soon as what it reads can be no call of a known function, so that other JSON is not held back."""

    _KEYS = frozenset((*NAME_KEYS, *ARGUMENTS_KEYS, "id", "type"))

    def __init__(self, names: Collection[str], *, lists: bool) -> None:
        super().__init__()
        self._names = names
        self._lists = lists
        self._depth = 1
        self._key = ""

    def watches(self, depth: int) -> bool:
        return depth == self._depth

    def saw_start(self, depth: int, character: str) -> None:
        if depth == 0 and character == "[" and self._lists:
            self._depth = 2
        elif depth < self._depth and character != "{":
            raise NotJson("no call")
        elif depth == self._depth and self._key in ARGUMENTS_KEYS and character not in '{"':
            raise NotJson("no arguments")
        elif depth == self._depth and self._key in NAME_KEYS and character != '"':
            raise NotJson("no name")

    def saw_key(self, depth: int, key: str) -> None:
        if key not in self._KEYS:
            raise NotJson("no call")
        self._key = key

    def saw_string(self, depth: int, value: str) -> None:
        if self._key in NAME_KEYS and value not in self._names:
            raise NotJson("no known function")


class ObjectsBody:
    """Calls as JSON objects or lists of them, one or several, up to the closer if there is one."""

    def __init__(self, names: Collection[str], closer: str) -> None:
        self.state = State.OPEN
        self.calls: list[Call] = []
        self.rescans = True
        self._names = names
        self._closer = closer
        self._closed = 0
        self._parts: list[str] = []
        self._scanner: JsonScanner | None = None

    def feed(self, text: str, at: int) -> int:
        """Go on from *at*; return where it is done, or the end of the text."""
        while at < len(text) and self.state is State.OPEN:
            if self._scanner is not None:
                at = self._go_through_value(self._scanner, text, at)
            elif self._closed or (self.calls and text[at] == self._closer[0]):
                if text[at] != self._closer[self._closed]:
                    self.state = State.REFUSED
                    return at
                self._closed += 1
                at += 1
                if self._closed == len(self._closer):
                    self.state = State.DONE
            elif text[at] in "{[":
                self._scanner = JsonScanner()
            elif text[at] in (_GAP if self.calls else _SPACE):
                at += 1
            else:
                self.state = State.REFUSED
        return at

    def finish(self) -> None:
        """Decide: calls that are complete need no closer at the end of an answer."""
        complete = self.calls and self._scanner is None
        self.state = State.DONE if complete else State.REFUSED

    def _go_through_value(self, scanner: JsonScanner, text: str, at: int) -> int:
        try:
            end = scanner.feed(text, at)
            self._parts.append(text[at:end])
            if scanner.done:
                self.calls += read_calls("".join(self._parts), self._names, strict=False)
                self._parts.clear()
                self._scanner = None
                if not self._closer:
                    self.state = State.DONE
        except (NotJson, NoCall):
            self.state = State.REFUSED
            return at
        return end


class BareBody:
    """One call, or a list of calls, without any marker: refused at the first sign that it is other JSON."""

    def __init__(self, names: Collection[str], *, lists: bool) -> None:
        self.state = State.OPEN
        self.calls: list[Call] = []
        self.rescans = True
        self._names = names
        self._parts: list[str] = []
        self._scanner = _CallScanner(names, lists=lists)

    def feed(self, text: str, at: int) -> int:
        """Go on from *at*; return where it is done, or the end of the text."""
        try:
            end = self._scanner.feed(text, at)
            self._parts.append(text[at:end])
            if self._scanner.done:
                self.calls = read_calls("".join(self._parts), self._names, strict=True)
                self.state = State.DONE
        except (NotJson, NoCall):
            self.state = State.REFUSED
            return at
        return end

    def finish(self) -> None:
        """Decide: what is not complete is no call."""
        self.state = State.REFUSED


class NamedBody:
    """A name, perhaps an id, and the arguments: `f[CALL_ID]123[ARGS]{…}`. Or a list of objects, as older models do."""

    def __init__(self, names: Collection[str]) -> None:
        self.state = State.OPEN
        self.calls: list[Call] = []
        self.rescans = True
        self._names = names
        self._head = ""
        self._list: ObjectsBody | None = None
        self._scanner: JsonScanner | None = None
        self._parts: list[str] = []

    def feed(self, text: str, at: int) -> int:
        """Go on from *at*; return where it is done, or the end of the text."""
        while at < len(text) and self.state is State.OPEN:
            if self._list is not None:
                at = self._list.feed(text, at)
                self.state, self.calls = self._list.state, self._list.calls
            elif self._scanner is not None:
                at = self._go_through_arguments(self._scanner, text, at)
            elif not self._head and text[at] in _SPACE:
                at += 1
            elif not self._head and text[at] == "[":
                self._list = ObjectsBody(self._names, "")
            else:
                self._head += text[at]
                at += 1
                if self._head.endswith("[ARGS]"):
                    self._scanner = JsonScanner()
                elif not self._may_be_head():
                    self.state = State.REFUSED
        return at

    def finish(self) -> None:
        """Decide: what is not complete is no call."""
        self.state = State.REFUSED

    def _may_be_head(self) -> bool:
        if len(self._head) > _MAX_NAME_CHARACTERS:
            return False
        _, bracket, tag = self._head.rpartition("[")
        return not bracket or "]" in tag or any(known.startswith(tag) for known in ("ARGS]", "CALL_ID]"))

    def _go_through_arguments(self, scanner: JsonScanner, text: str, at: int) -> int:
        try:
            end = scanner.feed(text, at)
            self._parts.append(text[at:end])
            if scanner.done:
                name = self._head.removesuffix("[ARGS]").partition("[CALL_ID]")[0].strip()
                if name not in self._names:
                    raise NoCall("no known function")
                self.calls = [Call(name, read_arguments("".join(self._parts)))]
                self.state = State.DONE
        except (NotJson, NoCall):
            self.state = State.REFUSED
            return at
        return end
