from __future__ import annotations

import json
from typing import Any

import pytest

from lmd.runner.format_error import FormatError
from lmd.runner.json_schema import prepare_schema


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the schema is not JSON: line 1, column 1: expecting value"),
        ('{\n  "type": "object",\n}', "the schema is not JSON: line "),
        ('{"minimum": NaN}', "NaN is no JSON number"),
        ('{"minimum": 1e999}', "the number 1e999 in the schema is too large"),
        ('{"minimum": ' + "9" * 5000 + "}", "a number in the schema has too many digits"),
        ("[]", "the schema must be an object or a boolean, not a list"),
        ("null", "the schema must be an object or a boolean, not null"),
        ("false", "no value can satisfy the schema: it is false"),
        ('{"properties": ' * 60 + "1" + "}" * 60, "must be an object"),
        ('{"a": ' * 101 + "1" + "}" * 101, "nested more than 100 levels deep"),
        ("[" * 100_000, "nested more than 100 levels deep"),
        ('{"properties": {"a": {"not": {}}}}', "the keyword 'not' at #/properties/a is not supported; say what"),
        ('{"items": {"uniqueItems": true}}', "the keyword 'uniqueItems' at #/items is not supported"),
        ('{"if": {}, "then": {}}', "the keyword 'if' at # is not supported"),
        ('{"anyOf": [{}, {"contains": {}}]}', "the keyword 'contains' at #/anyOf/1 is not supported"),
        (
            '{"additionalProperties": {"dependentRequired": {"a": ["b"]}}}',
            "'dependentRequired' at #/additionalProperties",
        ),
        ('{"unevaluatedProperties": false}', "the keyword 'unevaluatedProperties' at # is not supported"),
        ('{"type": "strin"}', "'type' at # must be one of array, boolean"),
        ('{"type": []}', "or a list of them, not an empty list"),
        (
            '{"properties": {"a/b": {"minLength": -1}}}',
            "'minLength' at #/properties/a~1b must be a whole number, 0 or more",
        ),
        ('{"maxItems": 1.5}', "'maxItems' at # must be a whole number, 0 or more, not 1.5"),
        ('{"minimum": "a"}', "'minimum' at # must be a number, not 'a'"),
        ('{"multipleOf": 0}', "'multipleOf' at # must be a number above 0, not 0"),
        ('{"pattern": 5}', "'pattern' at # must be a string, not 5"),
        ('{"pattern": "a\\\\"}', "'pattern' at # is no usable regular expression: it ends with a backslash"),
        ('{"required": "a"}', "'required' at # must be a list of names, not 'a'"),
        ('{"enum": []}', "'enum' at # must be a list of at least one value, not an empty list"),
        ('{"properties": []}', "'properties' at # must be an object, not an empty list"),
        ('{"anyOf": {}}', "'anyOf' at # must be a list, not an object"),
        ('{"items": 5}', "the schema at #/items must be an object or a boolean, not a number"),
        ('{"format": "regex"}', "'format' at # is 'regex', which is not supported; known are date, date-time"),
        ('{"$schema": "https://example.org/mine"}', "'$schema' at # is 'https://example.org/mine', which is unknown"),
        ('{"items": {"$id": "https://example.org"}}', "'$id' at #/items is not supported"),
        ('{"$ref": 5}', "'$ref' at # must be a string, not 5"),
        (
            '{"items": {"$ref": "other.json"}}',
            "'$ref' at #/items leads to 'other.json'; only places in the same schema",
        ),
        ('{"$ref": "#/$defs/a"}', "'$ref' at # leads to '#/$defs/a', which does not exist"),
        ('{"const": "a\\u0001"}', "'const' at # has the control character U+0001"),
        ('{"enum": [{"\\u007f": 1}]}', "'enum' at # has the control character U+007F"),
        ('{"exclusiveMinimum": 0, "maximum": 0.5}', "'exclusiveMinimum' at # is less than 1 away from another bound"),
        ('{"allOf": [{"exclusiveMaximum": 3}, {"minimum": 2.5}]}', "use 'maximum'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        prepare_schema(text)
    assert said in str(caught.value)


def prepared(schema: Any) -> Any:
    return json.loads(prepare_schema(json.dumps(schema)).text)


def test_keywords_that_ask_for_nothing_are_dropped() -> None:
    schema = {
        "type": "array",
        "uniqueItems": False,
        "then": {},
        "minContains": 1,
        "unevaluatedItems": True,
        "propertyNames": {"type": "string"},
        "x-guidance": {"lenient": True},
        "$id": "https://example.org",
        "description": "kept",
    }
    assert prepared(schema) == {"type": "array", "description": "kept"}
    assert prepared({"type": "integer", "format": "int32"}) == {"type": "integer"}


def test_what_no_reference_leads_to_does_not_matter() -> None:
    schema = {"type": "string", "$defs": {"a": {"not": {}}}}
    assert prepared(schema) == schema
    with pytest.raises(FormatError, match="#/\\$defs/a"):
        prepared({"$ref": "#/$defs/a", "$defs": {"a": {"not": {}}}})


def test_data_is_not_taken_for_keywords() -> None:
    schema = {
        "properties": {"not": {"const": {"not": 1}}, "$ref": {"enum": [{"$ref": "x"}]}, "id": {"default": {"if": 1}}}
    }
    assert prepared(schema) == schema


def test_places_are_found_through_escapes() -> None:
    schema = {"$ref": "#/$defs/a~1b%25~0", "$defs": {"a/b%~": {"type": "null"}}}
    assert prepared(schema) == schema


@pytest.mark.parametrize(
    ("alternatives", "exclusive"),
    [
        ([{"type": "string"}, {"type": "integer"}], True),
        ([{"type": "number"}, {"type": "integer"}], False),
        ([{"const": 1}, {"enum": ["a", "b"]}], True),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"type": ["string", "null"]}, {"type": ["null", "object"]}], False),
        (
            [_kind, _kind]
            if (_kind := {"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]})
            else [],
            False,
        ),
        ([{**_kind, "properties": {"k": {"const": 2}}}, _kind], True),
        ([{**_kind, "properties": {"k": {"const": 2}}, "required": []}, _kind], False),
        ([{"properties": {"k": {"const": 2}}, "required": ["k"]}, _kind], False),
        ([{"$ref": "#/$defs/s"}, {"type": "null"}], True),
    ],
)
def test_one_of_becomes_any_of_when_that_is_the_same(alternatives: list[Any], exclusive: bool) -> None:
    schema = prepared({"oneOf": alternatives, "$defs": {"s": {"type": "string"}}})
    assert ("anyOf" in schema) is exclusive
    assert ("oneOf" in schema) is not exclusive


def test_one_of_beside_any_of_keeps_both() -> None:
    any_of, one_of = [{"type": "string"}, {"type": "null"}], [{"const": "a"}, {"const": None}]
    assert prepared({"anyOf": any_of, "oneOf": one_of}) == {"anyOf": any_of, "allOf": [{"anyOf": one_of}]}


def test_one_of_inside_one_of() -> None:
    assert prepared({"oneOf": [{"oneOf": [True]}]}) == {"anyOf": [{"anyOf": [True]}]}


ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#/$defs/endless"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/endless", "$defs": {"endless": ENDLESS}},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"anyOf": [{"$ref": "#"}, {"allOf": [{"type": "string"}, {"$ref": "#"}]}]},
        {"type": "object", "required": ["x"], "additionalProperties": {"$ref": "#"}},
    ],
)
def test_recursion_without_end_is_an_error(schema: Any) -> None:
    with pytest.raises(FormatError, match="recurses without end"):
        prepared(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]},
    ],
)
def test_recursion_with_an_end_is_left_alone(schema: Any) -> None:
    assert prepared(schema) == schema


def test_only_the_endless_part_of_a_schema_is_taken_out() -> None:
    schema = {"properties": {"x": {"$ref": "#/$defs/endless"}, "y": {"type": "null"}}, "$defs": {"endless": ENDLESS}}
    assert prepared(schema)["$defs"]["endless"] == {"enum": []}
    assert prepared(schema)["properties"]["y"] == {"type": "null"}


def test_a_long_chain_of_references_is_settled_at_once() -> None:
    chain: dict[str, Any] = {
        f"r{i}": {
            "type": "object",
            "properties": {n: {"$ref": f"#/$defs/r{i + 1}"} for n in "ab"},
            "required": ["a", "b"],
        }
        for i in range(500)
    }
    schema = {"$ref": "#/$defs/r0", "$defs": {**chain, "r500": {"type": "null"}}}
    assert prepared(schema) == schema
