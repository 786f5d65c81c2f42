"""Grammars with which an answer is calls of functions and nothing else, in the way the model writes them.

What is around the arguments is fixed; the arguments fit the function's JSON Schema. Special tokens among the markers
have no text of their own in an answer, so a grammar is written for a vocabulary: `CallGrammar.lark`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmd.runner.answer_style import CHANNEL_MARKERS, AnswerStyle, Calls, Form
from lmd.runner.format_error import FormatError
from lmd.runner.json_schema import OPTIONS, prepare_schema
from lmd.runner.tool_calls import is_text
from lmd.runner.v1 import frames_pb2

# What tells the end of a name where no quotes do.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")
# What says nothing about the arguments of a function.
_REMARKS = frozenset(
    ("$schema", "$id", "$defs", "definitions", "$comment", "title", "description", "default", "examples", "strict")
)
_TEXT_KEYWORDS = _REMARKS | {"type", "enum", "const"}
_OBJECT_KEYWORDS = _REMARKS | {"type", "properties", "required", "additionalProperties"}


@dataclass(frozen=True, slots=True)
class Function:
    """A function with the schema of its arguments, ready for llguidance."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """One or more calls in the way of a model.

    Attributes:
        markers: the texts that are special tokens in most vocabularies.
        patterns: regular expressions in the schemas, each with words for where it stands.
        key: equal for equal grammars.
    """

    calls: Calls
    functions: tuple[Function, ...]
    markers: tuple[str, ...]
    patterns: Mapping[str, str]

    @property
    def key(self) -> bytes:
        """The same for the same grammar."""
        functions = [[function.name, function.schema] for function in self.functions]
        return repr(self.calls).encode() + json.dumps(functions).encode()

    def lark(self, special: Mapping[str, int]) -> str:
        """Return the grammar for llguidance; *special* has the tokens of those markers that have no text."""
        return _Writer(self, special).write()


def call_grammar(style: AnswerStyle, tools: Sequence[frames_pb2.Tool], only: str) -> CallGrammar:
    """Return the grammar of answers that call at least one of *tools*, or only the one that *only* names.

    Raises:
        FormatError: a function's schema cannot be honoured, or there is no such function.
    """
    if style.calls is None:
        raise FormatError("the model's chat template knows no functions")
    wanted = [tool for tool in tools if only in ("", tool.name)]
    if not wanted:
        raise FormatError(f"there is no function '{only}' to call" if only else "there are no functions to call")
    patterns: dict[str, str] = {}
    functions = tuple(_function_of(tool, style.calls, patterns) for tool in wanted)
    return CallGrammar(style.calls, functions, style.markers, patterns)


def _function_of(tool: frames_pb2.Tool, calls: Calls, patterns: dict[str, str]) -> Function:
    where = f"the parameters of the function '{tool.name}'"
    if calls.form is not Form.OBJECT and _PLAIN_NAME.fullmatch(tool.name) is None:
        raise FormatError(f"the name '{tool.name}' cannot be written in this model's way of calling functions")
    try:
        prepared = prepare_schema(tool.parameters or "{}")
        schema = _as_object(json.loads(prepared.text))
        if calls.form is Form.TAGGED:
            _check_tagged(schema)
    except FormatError as error:
        raise FormatError(f"{where} cannot be enforced: {error}") from error
    patterns.update({pattern: f"{place} of '{tool.name}'" for pattern, place in prepared.patterns.items()})
    return Function(tool.name, schema)


def _as_object(schema: Any) -> dict[str, Any]:
    """Return a schema that only objects fit."""
    kind = schema.get("type", "object")
    if "object" not in ([kind] if isinstance(kind, str) else kind):
        raise FormatError(f"'type' at # must be 'object', not {json.dumps(kind)}: arguments are objects")
    return {**schema, "type": "object"}


def _check_tagged(schema: Mapping[str, Any]) -> None:
    """Refuse what cannot be enforced where each argument is written by itself."""
    for keyword in schema:
        if keyword not in _OBJECT_KEYWORDS:
            raise FormatError(f"'{keyword}' at # is not supported in this model's way of calling functions")
    for name, value in schema.get("properties", {}).items():
        if re.search(r"[<>\n]", name):
            raise FormatError(f"the name '{name}' of a property cannot be written in this model's way")
        if is_text(value):
            for keyword in value:
                if keyword not in _TEXT_KEYWORDS:
                    raise FormatError(
                        f"'{keyword}' at #/properties/{name} is not supported in this model's way of calling functions"
                    )


class _Writer:
    def __init__(self, grammar: CallGrammar, special: Mapping[str, int]) -> None:
        self._grammar = grammar
        self._calls = grammar.calls
        self._special = special
        known = [marker for marker in dict.fromkeys((*grammar.markers, *CHANNEL_MARKERS)) if marker in special]
        self._split = re.compile("(" + "|".join(map(re.escape, known)) + ")") if known else None
        self._rules: list[str] = []

    def write(self) -> str:
        names = []
        for number, function in enumerate(self._grammar.functions):
            names.append(f"call{number}")
            self._rules.append(f"call{number}: {self._call(number, function)}")
        self._rules.append("call: " + " | ".join(names))
        return "\n".join([self._start(), *self._rules]) + "\n"

    def _start(self) -> str:
        calls = self._calls
        if calls.form is Form.CHANNEL:
            return "start: call"
        opener = "" if calls.unmarked else calls.opener
        before, after = self._text(opener + calls.pad), self._text(calls.pad + calls.closer)
        if calls.listed:
            before, after = self._text(opener + "["), self._text("]" + calls.closer)
            return f'start: {before} call (", " call)* {after}'
        return f"start: block ({self._text(calls.gap)} block)*\nblock: {before} call {after}"

    def _call(self, number: int, function: Function) -> str:
        """Return how a function is called."""
        calls = self._calls
        if calls.form is Form.TAGGED:
            return self._tagged(number, function)
        arguments = self._json(f"args{number}", function.schema)
        if calls.form is Form.NAMED:
            return f"{self._text(function.name + '[ARGS]')} {arguments}"
        if calls.form is Form.CHANNEL:
            header = f"<|channel|>commentary to=functions.{function.name} <|constrain|>json<|message|>"
            return f"{self._text(header)} {arguments}"
        name, key = json.dumps(function.name, ensure_ascii=False), calls.arguments_key
        head = f'{{{calls.lead}"{calls.name_key}": {name}, "{key}": '
        return f'{self._text(head)} {arguments} "}}"'

    def _tagged(self, number: int, function: Function) -> str:
        parts = [self._text(f"<function={function.name}>\n")]
        schema = function.schema
        required: Collection[str] = schema.get("required", ())
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        for place, (name, value) in enumerate(schema.get("properties", {}).items()):
            if value is False:
                continue
            rule = f"args{number}_{place}"
            head = self._text(f"<parameter={name}>\n")
            if not is_text(value):
                value = {**shared, **value} if isinstance(value, dict) else shared
                part = f'{head} {self._json(rule, value)} "\\n</parameter>\\n"'
            elif "const" in value or "enum" in value:
                values = [value["const"]] if "const" in value else value["enum"]
                # What is not a string is null, if anything.
                values = [text for text in values if text is None or isinstance(text, str)]
                options = " | ".join(_quoted(f"{text}\n</parameter>\n") for text in values)
                part = f"{head} ({options})"
            else:
                self._rules.append(f"{rule}[lazy]: /(?s:.*)<\\/parameter>/")
                part = f'{head} {rule} "\\n"'
            parts.append(part if name in required else f"({part})?")
        parts.append(self._text("</function>"))
        return " ".join(parts)

    def _json(self, rule: str, schema: Mapping[str, Any]) -> str:
        """Add a rule for values of a schema and return its name."""
        self._rules.append(f"{rule}: %json " + json.dumps({**schema, "x-guidance": OPTIONS}))
        return rule

    def _text(self, text: str) -> str:
        """Return what stands for a text, with its special tokens."""
        parts = self._split.split(text) if self._split is not None else [text]
        return (
            " ".join(f"<[{self._special[part]}]>" if part in self._special else _quoted(part) for part in parts if part)
            or '""'
        )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
