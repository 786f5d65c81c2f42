"""What clients send: strict JSON, and one sentence about what is wrong."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lmd.daemon.http.bodies import MAX_DEPTH, BodyError, as_model, parse_json


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "missing request body"),
        (b" \r\n\t", "missing request body"),
        (b"{", "the body is not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        (b'{"a": 1,\n "b": }', "the body is not JSON: Expecting value at line 2, column 7"),
        (b"{} {}", "the body is not JSON: Extra data at line 1, column 4"),
        (b"{'a': 1}", "the body is not JSON: "),
        (b'{"a": "\x01"}', "the body is not JSON: Invalid control character"),
        (b'{"a": "\xff"}', "the body is not UTF-8: byte 7 starts no character"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "the number 1e999 is out of range"),
        (b'{"a": %b}' % (b"9" * 5000), "is out of range"),
        (b'{"a": 1, "b": 2, "a": 3}', "the body names the key 'a' twice in one object"),
        (b'{"x": {"a": 1, "a": 1}}', "the body names the key 'a' twice in one object"),
        (b"[" * 200 + b"]" * 200, f"the body is nested more than {MAX_DEPTH} levels deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, f"the body is nested more than {MAX_DEPTH} levels deep"),
        (b"\xef\xbb\xbf{}", "the body is not JSON: "),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_wrong_is_told_in_one_sentence(body: bytes, says: str) -> None:
    with pytest.raises(BodyError) as caught:
        parse_json(body)
    assert says in caught.value.message
    assert caught.value.status == 400
    assert len(caught.value.message) < 200


def test_brackets_in_texts_are_no_nesting() -> None:
    body = json.dumps({"a": "[{" * 500 + '\\"[[', "b": [[]] * 200}).encode()
    assert parse_json(body) == json.loads(body)


def test_the_deepest_that_is_allowed() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


def test_half_a_surrogate_pair_becomes_a_replacement_character_and_a_whole_one_stays() -> None:
    assert parse_json(rb'{"a\ud83d": ["x\ude00y", "\ud83d\ude00", "\\ud83d"]}') == {"a�": ["x�y", "😀", "\\ud83d"]}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(json_values)
def test_every_json_value_is_read_as_it_is(value: Any) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    assert parse_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_body_error(body: bytes) -> None:
    with contextlib.suppress(BodyError):
        parse_json(body)


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    content: str | list[Part]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Request(BaseModel):
    model: str
    messages: list[Message] = []
    seed: int = Field(default=0, ge=0)
    strict: Strict | None = None

    @field_validator("model")
    @classmethod
    def check(cls, value: str) -> str:
        if not value:
            raise ValueError("`model` cannot be empty")
        return value


@pytest.mark.parametrize(
    ("value", "field", "says"),
    [
        ([], "", "the body must be a JSON object, not an array"),
        (None, "", "the body must be a JSON object, not null"),
        ("x", "", "the body must be a JSON object, not a string"),
        ({}, "model", "`model` is missing"),
        ({"model": 1}, "model", "`model`: input should be a valid string"),
        ({"model": ""}, "model", "`model` cannot be empty"),
        ({"model": "m", "seed": -1}, "seed", "`seed`: input should be greater than or equal to 0"),
        ({"model": "m", "messages": [{}]}, "messages.0.content", "`messages.0.content` is missing"),
        ({"model": "m", "messages": [{"content": 1}]}, "messages.0.content", "`messages.0.content`: input should be a"),
        (
            {"model": "m", "messages": [{"content": [{"type": "text", "text": 1}]}]},
            "messages.0.content.0.text",
            "`messages.0.content.0.text`: input should be a valid string",
        ),
        (
            {"model": "m", "messages": [{"content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "`messages.0.content.0.text` is missing",
        ),
        ({"model": "m", "strict": {"x": 1}}, "strict.x", "`strict.x` is not known"),
    ],
)
def test_the_first_wrong_field_is_named(value: object, field: str, says: str) -> None:
    with pytest.raises(BodyError) as caught:
        as_model(value, Request)
    assert caught.value.field == field
    assert caught.value.message.startswith(says)


def test_unknown_fields_are_ignored() -> None:
    assert as_model({"model": "m", "mirostat": 2}, Request).model_dump() == {
        "model": "m",
        "messages": [],
        "seed": 0,
        "strict": None,
    }
