"""What comes out under a JSON Schema is valid, whatever the model would like to say."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import Any

import jsonschema
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from lmd.runner.structured import FormatError
from tests.support.formats import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}


def is_valid(schema: Any, text: bytes) -> bool:
    # Numbers exactly as they are written: 6.3 is a multiple of 0.1.
    schema = json.loads(json.dumps(schema), parse_float=Fraction)
    value = json.loads(text, parse_float=_read_number)
    checker = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("number", _is_number).redefine(
        "integer", _is_integer
    )
    validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=checker)  # type: ignore[no-untyped-call]
    return bool(validator(schema).is_valid(value))


def _read_number(literal: str) -> Fraction:
    mantissa, _, exponent = literal.lower().partition("e")
    # Nothing in the schemas tells a large power of ten from a larger one.
    return Fraction(mantissa) * Fraction(10) ** max(-400, min(400, int(exponent or 0)))


def _is_number(checker: Any, value: Any) -> bool:
    return isinstance(value, int | Fraction) and not isinstance(value, bool)


def _is_integer(checker: Any, value: Any) -> bool:
    return _is_number(checker, value) and value.denominator == 1


LITERALS = st.sampled_from([None, True, False, 0, 1, -1, 2.5, "a", 'b"q', "é\n", "/\\", [], [1, "a"], {}, {"a": 1}])
NAMES = st.sampled_from(["a", "b", "ab", "é", 'q"'])
NUMBERS = st.sampled_from([-10, -1.5, 0, 0.25, 1, 7, 100, 1000.001])
PATTERNS = st.sampled_from(["^a", "b$", "^[a-c]+$", "a.c", r"^\d{3}$", "[^a]", "é|x", '^(a|")$', r"\\", r"\s\w", "/"])


def optional(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


def typed(name: str, **keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return optional(**keywords).map(lambda found: {"type": name, **found})


SIMPLE = st.one_of(
    st.just(True),
    st.sampled_from(["string", "null", "boolean"]).map(lambda name: {"type": name}),
    LITERALS.map(lambda value: {"const": value}),
    st.lists(LITERALS, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    st.sampled_from(["integer", "number"]).flatmap(
        lambda name: typed(
            name,
            minimum=NUMBERS,
            maximum=NUMBERS,
            exclusiveMinimum=NUMBERS,
            exclusiveMaximum=NUMBERS,
            multipleOf=st.sampled_from([1, 2, 3, 0.5, 0.1, 10, 7]),
        )
    ),
    typed("string", minLength=st.integers(0, 4), maxLength=st.integers(0, 6), pattern=PATTERNS),
)


def compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        typed(
            "array",
            items=inner,
            prefixItems=st.lists(inner, min_size=1, max_size=2),
            minItems=st.integers(0, 3),
            maxItems=st.integers(0, 4),
        ),
        typed(
            "object",
            properties=st.dictionaries(NAMES, inner, max_size=3),
            patternProperties=st.dictionaries(st.sampled_from(["^a", "b", "^x"]), inner, max_size=1),
            required=st.lists(NAMES, unique=True, max_size=2),
            additionalProperties=st.just(False) | inner,
            minProperties=st.integers(0, 2),
        ),
        several.map(lambda schemas: {"anyOf": schemas}),
        several.map(lambda schemas: {"oneOf": schemas}),
        st.lists(inner, min_size=2, max_size=2).map(lambda schemas: {"allOf": schemas}),
    )


SCHEMAS = st.recursive(SIMPLE, compound, max_leaves=6)


@settings(max_examples=400, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_what_a_random_schema_allows_is_valid(tiny: Tokenizer, schema: Any, seed: int) -> None:
    try:
        constraint = tiny.compile(json_schema=json.dumps(schema))
    except FormatError:
        reject()
    text, whole = tiny.ramble(constraint, seed, length=30)
    if not whole:
        reject()
    assert is_valid(schema, text), (schema, text)


@pytest.mark.parametrize("schema", [PERSON, TREE], ids=["person", "tree"])
def test_what_a_schema_allows_is_valid_with_a_real_tokenizer(llama3: Tokenizer, schema: dict[str, Any]) -> None:
    ended = 0
    for seed in range(5):
        text, whole = llama3.ramble(llama3.compile(json_schema=json.dumps(schema)), seed, length=30)
        ended += whole
        if whole:
            assert is_valid(schema, text), text
    assert ended


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
@pytest.mark.parametrize(
    "format_", [{"json_object": True}, {"json_schema": json.dumps(PERSON)}], ids=["json", "schema"]
)
def test_json_as_people_write_it_is_allowed(tiny: Tokenizer, format_: dict[str, Any], indent: int | str | None) -> None:
    for separators in ((",", ":"), (", ", ": ")) if indent is None else ((",", ": "), (",", ":")):
        text = json.dumps({"name": "Ada", "age": 36, "tags": ["red"]}, indent=indent, separators=separators)
        constraint = tiny.compile(**format_)
        assert all(constraint.accept(token) for token in tiny.tokenize(text)), text
        assert constraint.complete


def test_a_model_cannot_go_on_with_whitespace(tiny: Tokenizer) -> None:
    blanks = set().union(*(tiny.spell(blank) for blank in " \n\t\r"))
    constraint = tiny.compile(json_object=True)
    assert constraint.accept(tiny.tokenize("{")[0])
    count = 0
    while blank := sorted(blanks & set(tiny.allowed(constraint))):
        # A line break first: it may be followed by the most blanks.
        token = next((token for token in blank if token in tiny.spell("\n")), blank[0])
        assert constraint.accept(token)
        count += 1
    assert count == 33
    assert blanks.isdisjoint(tiny.allowed(constraint))


def test_json_mode_wants_an_object(tiny: Tokenizer) -> None:
    constraint = tiny.compile(json_object=True)
    assert {tiny.vocab.piece(token) for token in tiny.allowed(constraint)} == {b"{"}
    for seed in range(10):
        text, whole = tiny.ramble(tiny.compile(json_object=True), seed, length=30)
        assert not whole or isinstance(json.loads(text), dict)


def test_alternatives_that_exclude_each_other_are_supported(tiny: Tokenizer) -> None:
    schema = {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "$defs": {
            kind: {
                "type": "object",
                "properties": {"kind": {"const": kind}, "legs": {"type": "integer", "maximum": 9, "minimum": 0}},
                "required": ["kind", "legs"],
                "additionalProperties": False,
            }
            for kind in ("cat", "dog")
        },
    }
    kinds = set()
    for seed in range(20):
        text, whole = tiny.ramble(tiny.compile(json_schema=json.dumps(schema)), seed, length=30)
        assert whole
        assert is_valid(schema, text)
        kinds.add(json.loads(text)["kind"])
    assert kinds == {"cat", "dog"}


def test_a_value_that_could_never_end_is_never_begun(tiny: Tokenizer) -> None:
    endless = {"type": "object", "properties": {"next": {"$ref": "#/$defs/endless"}}, "required": ["next"]}
    schema = {
        "$defs": {"endless": endless},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/endless"}, "b": {"type": "null"}},
        "additionalProperties": False,
    }
    texts = {tiny.ramble(tiny.compile(json_schema=json.dumps(schema)), seed, length=40) for seed in range(20)}
    assert {re.sub(rb"\s", b"", text) for text, whole in texts if whole} == {b"{}", b'{"b":null}'}
    assert all(whole for _, whole in texts)


def test_the_largest_schemas_leave_the_runner_alive(tiny: Tokenizer) -> None:
    chain: dict[str, Any] = {f"r{i}": {"type": "array", "items": {"$ref": f"#/$defs/r{i + 1}"}} for i in range(1900)}
    constraint = tiny.compile(json_schema=json.dumps({"$ref": "#/$defs/r0", "$defs": {**chain, "r1900": {"const": 1}}}))
    for token in tiny.tokenize("[[[]]]"):
        assert constraint.accept(token)
    assert constraint.complete


def _tangle(count: int) -> dict[str, Any]:
    names = range(count)
    return {
        "$ref": "#/$defs/r0",
        "$defs": {f"r{i}": {"anyOf": [{"$ref": f"#/$defs/r{j}"} for j in names] + [{"const": i}]} for i in names},
    }


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (_tangle(60), "more than 2,000 references"),
        ({"patternProperties": {f"^p{i}_": {"type": "string"} for i in range(1000)}}, "more than 64 patterns"),
        ({"type": "integer", "multipleOf": 1000003}, "'multipleOf' at # has too many digits"),
        ({"const": "x" * 40_000}, "constants in the schema have more than 32,768 characters"),
        ({"type": "string", "maxLength": 10**18}, "'maxLength' at # is more than 1,000,000,000"),
        (
            {"allOf": [{"type": "string", "pattern": f"{a}.*{a}.{{10}}"} for a in "abcdefgh"]},
            "the schema is too complex",
        ),
        ({"enum": ["x" * 100] * 3000}, "bytes, but at most 262,144 are allowed"),
    ],
    ids=["tangle", "name patterns", "multiple", "constant", "count", "patterns", "size"],
)
def test_a_hostile_schema_is_refused(tiny: Tokenizer, schema: dict[str, Any], said: str) -> None:
    with pytest.raises(FormatError) as caught:
        tiny.compile(json_schema=json.dumps(schema))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ('{"allOf": [{"type": "string"}, {"type": "integer"}]}', "no value can satisfy the schema: incompatible types"),
        ('{"type": "object", "required": ["a"], "additionalProperties": false}', "required property 'a'"),
        ('{"type": "string", "minLength": 3, "maxLength": 2}', "minLength (3) is greater than maxLength (2)"),
        ('{"type": "integer", "minimum": 3, "maximum": 2}', "minimum (3) is greater than maximum (2)"),
        ('{"type": "string", "pattern": "^a$", "minLength": 2}', "no value can satisfy the schema"),
        (
            '{"properties": {"a": {"pattern": "x/\\n(y"}}}',
            "'pattern' at #/properties/a is no usable regular expression",
        ),
        ('{"properties": {"a": {"pattern": "x/\\n(y"}}}', "unclosed group at character 4"),
        ('{"patternProperties": {"(": {}}}', "the name '(' in 'patternProperties' at # is no usable"),
        ('{"items": {"pattern": "a\\\\b"}}', "'pattern' at #/items has \\b where it cannot be used"),
        ('{"patternProperties": {"a": {}, "b": {}}, "type": "object"}', "told apart, but 'a' and 'b' both match some"),
        ('{"oneOf": [{"type": "string"}, {"maxLength": 3}]}', "'oneOf' is supported only when"),
        ('{"type": "object", "properties": {"a": {}}, "minProperties": 1}', "'minProperties' and 'maxProperties'"),
        ('{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "recurses without end"),
        ('{"type": "number", "minimum": 1e300, "maximum": 1e301}', "the bounds of a number"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_explained(tiny: Tokenizer, schema: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        tiny.compile(json_schema=schema)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
