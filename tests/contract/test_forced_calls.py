"""What comes out when calls are forced is calls, in the model's own way, with arguments that fit."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.runner.answer_style import AnswerStyle, Calls
from lmd.runner.forced_calls import call_grammar
from lmd.runner.format_error import FormatError
from lmd.runner.structured import Constraint
from lmd.runner.v1.frames_pb2 import Tool
from tests.support.answers import STYLES, calls_in, read, write_calls
from tests.support.formats import Tokenizer

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
        "at": {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False}},
}
TOOLS = [
    Tool(name="get", parameters='{"type": "object", "properties": {}, "additionalProperties": false}'),
    Tool(name="get_weather", parameters=json.dumps(WEATHER)),
]
CALLS: list[tuple[str, dict[str, object]]] = [
    ("get_weather", {"city": 'Köln "am" Rhein\\', "days": 3, "unit": "C", "at": [{"x": 1.5}, {}]}),
    ("get", {}),
    ("get_weather", {"city": "", "days": 14}),
]


def compile_calls(tokenizer: Tokenizer, style: AnswerStyle, tools: list[Tool], only: str = "") -> Constraint:
    return tokenizer.compiler.compile(call_grammar(style, tools, only))


def accepts(tokenizer: Tokenizer, constraint: Constraint, text: str) -> bool:
    return all(constraint.accept(token) for token in tokenizer.tokenize(text)) and constraint.accepting


def check(style: AnswerStyle, text: str, names: set[str]) -> None:
    """Check that an answer is calls and nothing else."""
    parts = read(style, [text], tools=TOOLS)
    calls = calls_in(parts)
    assert calls, text
    assert len(calls) == len(parts), (text, parts)
    for call in calls:
        assert call.name in names
        schema = json.loads(next(tool.parameters for tool in TOOLS if tool.name == call.name))
        jsonschema.validate(json.loads(call.arguments), schema)


@pytest.mark.parametrize("name", STYLES)
def test_what_the_model_writes_is_accepted(llama3: Tokenizer, name: str) -> None:
    style = STYLES[name]
    for calls in [CALLS[:1], CALLS[1:2]] if name == "channels" else [CALLS, CALLS[:1], CALLS[1:2]]:
        text = write_calls(style, calls)
        assert accepts(llama3, compile_calls(llama3, style, TOOLS), text), text
        check(style, text, {"get", "get_weather"})


@pytest.mark.parametrize("name", STYLES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=15)
def test_whatever_is_accepted_is_calls(tiny: Tokenizer, name: str, seed: int) -> None:
    text, ended = tiny.ramble(compile_calls(tiny, STYLES[name], TOOLS), seed, 60)
    if ended:
        check(STYLES[name], text.decode(), {"get", "get_weather"})


@pytest.mark.parametrize("name", STYLES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=5)
def test_the_named_function_is_called_and_no_other(tiny: Tokenizer, name: str, seed: int) -> None:
    text, ended = tiny.ramble(compile_calls(tiny, STYLES[name], TOOLS, only="get"), seed, 20)
    if ended:
        check(STYLES[name], text.decode(), {"get"})


@pytest.mark.parametrize("name", STYLES)
def test_text_is_not_accepted(llama3: Tokenizer, name: str) -> None:
    constraint = compile_calls(llama3, STYLES[name], TOOLS)
    assert not constraint.accepting
    assert not accepts(llama3, constraint, "Sure, the weather")
    wrong: list[tuple[str, dict[str, object]]] = [("get_weather", {"city": "Oslo", "days": 15})]
    assert not accepts(llama3, compile_calls(llama3, STYLES[name], TOOLS), write_calls(STYLES[name], wrong))


def test_a_marker_that_is_a_special_token_is_written_as_that(tiny: Tokenizer) -> None:
    style = AnswerStyle(calls=Calls("<|im_start|>", "", listed=True))
    special = tiny.vocab.tokenize(b"<|im_start|>", add_special=False, parse_special=True)[0]
    assert tiny.vocab.piece(special) == b""
    constraint = compile_calls(tiny, style, TOOLS, "get")
    assert tiny.allowed(constraint) == [special]
    assert constraint.accept(special)
    text, ended = tiny.ramble(constraint, 1, 10)
    assert ended
    assert json.loads(text)[0] == {"name": "get", "arguments": {}}


def test_arguments_are_an_object_whatever_the_schema_forgets(tiny: Tokenizer) -> None:
    for parameters in ("", "{}", '{"properties": {"a": {"type": "integer"}}}', '{"type": ["object", "null"]}'):
        constraint = compile_calls(tiny, STYLES["hermes"], [Tool(name="f", parameters=parameters)])
        assert accepts(tiny, constraint, '<tool_call>\n{"name": "f", "arguments": {"a":1}}\n</tool_call>')
        constraint = compile_calls(tiny, STYLES["hermes"], [Tool(name="f", parameters=parameters)])
        assert not accepts(tiny, constraint, '<tool_call>\n{"name": "f", "arguments": null}\n</tool_call>')


def test_strings_between_tags_may_be_one_of_several(tiny: Tokenizer) -> None:
    schema = {"properties": {"a": {"type": "string", "enum": ["x", "y"]}, "b": {"const": "z"}}, "required": ["a"]}
    tools = [Tool(name="f", parameters=json.dumps(schema))]
    for arguments, fits in (({"a": "x"}, True), ({"a": "y", "b": "z"}, True), ({"a": "z"}, False), ({"b": "z"}, False)):
        text = write_calls(STYLES["tagged"], [("f", dict(arguments))])
        assert accepts(tiny, compile_calls(tiny, STYLES["tagged"], tools), text) is fits, text


@given(
    city=st.text().filter(lambda text: "</parameter>" not in text), places=st.none() | st.lists(st.text(), max_size=2)
)
@settings(max_examples=30)
def test_any_string_can_stand_between_tags(tiny: Tokenizer, city: str, places: list[str] | None) -> None:
    schema = {
        "properties": {
            "city": {"type": ["string", "null"]},
            "places": {"type": ["array", "null"], "items": {"type": "string"}},
        },
        "required": ["city", "places"],
    }
    tools = [Tool(name="f", parameters=json.dumps(schema))]
    made: dict[str, object] = {"city": city, "places": places}
    text = write_calls(STYLES["tagged"], [("f", made)])
    # Escapes of single characters are not among what the grammar allows.
    if "\\u" not in text:
        assert accepts(tiny, compile_calls(tiny, STYLES["tagged"], tools), text)
    read_back = [json.loads(call.arguments) for call in calls_in(read(STYLES["tagged"], [text], tools=tools))]
    assert read_back == [{"city": None if city in ("null", "None") else city, "places": places}]


def test_what_ends_a_string_between_tags_ends_it_for_the_grammar_too(tiny: Tokenizer) -> None:
    text = "<tool_call>\n<function=f>\n<parameter=s>\na</parameter>b\n</parameter>\n</function>\n</tool_call>"
    tools = [Tool(name="f", parameters='{"properties": {"s": {"type": "string"}}}')]
    assert not calls_in(read(STYLES["tagged"], [text], tools=tools))
    assert not accepts(tiny, compile_calls(tiny, STYLES["tagged"], tools), text)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("hermes", '{"type": "string"}', "'f'.*'type' at #"),
        ("hermes", '{"not": {}}', "'f'.*'not' at #"),
        ("hermes", '{"properties": {"a": {"uniqueItems": true}}}', "'f'.*'uniqueItems' at #/properties/a"),
        ("hermes", "{", "'f'.*not JSON"),
        ("hermes", "3", "'f'.*object"),
        ("hermes", "false", "'f'.*false"),
        ("tagged", '{"anyOf": [{"type": "object"}]}', "'f'.*'anyOf' at #"),
        ("tagged", '{"properties": {"a": {"type": "string", "pattern": "x"}}}', "'f'.*'pattern' at #/properties/a"),
        ("tagged", '{"properties": {"a>b": {"type": "string"}}}', "'f'.*'a>b'"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused(name: str, parameters: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        call_grammar(STYLES[name], [Tool(name="f", parameters=parameters)], "")


def test_only_known_functions_can_be_forced() -> None:
    with pytest.raises(FormatError, match="no function 'g'"):
        call_grammar(STYLES["hermes"], [Tool(name="f")], "g")
    with pytest.raises(FormatError, match="no functions"):
        call_grammar(STYLES["hermes"], [], "")
    with pytest.raises(FormatError, match="knows no functions"):
        call_grammar(AnswerStyle(), [Tool(name="f")], "")
    with pytest.raises(FormatError, match="'a b'"):
        call_grammar(STYLES["mistral named"], [Tool(name="a b")], "")
