from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.errors import InvalidRequest
from lmd.registry.parameters import (
    IGNORED,
    INT32_MAX,
    INT64_MAX,
    MAX_STOP_BYTES,
    MAX_STOPS,
    PARAMETERS,
    Kind,
    ParameterValue,
    format_value,
    lookup,
    parse_text,
    validate,
)
from lmd.v1 import model_pb2

PROTO = Path(__file__).resolve().parents[2] / "protos" / "lmd" / "v1" / "model.proto"
WIRE_TYPES = {
    FieldDescriptor.TYPE_INT32: Kind.INT,
    FieldDescriptor.TYPE_INT64: Kind.INT,
    FieldDescriptor.TYPE_FLOAT: Kind.FLOAT,
    FieldDescriptor.TYPE_BOOL: Kind.BOOL,
    FieldDescriptor.TYPE_STRING: Kind.TEXTS,
}


def test_the_table_is_the_wire_message() -> None:
    fields = model_pb2.DESCRIPTOR.message_types_by_name["Parameters"].fields
    assert [field.name for field in fields] == list(PARAMETERS)
    for field in fields:
        parameter = PARAMETERS[field.name]
        one_text = field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated
        assert (Kind.CHOICE if one_text else WIRE_TYPES[field.type]) is parameter.kind
        if field.type == FieldDescriptor.TYPE_INT32:
            assert parameter.maximum is not None
            assert parameter.maximum <= INT32_MAX


def test_the_comments_of_the_wire_message_state_the_same_ranges_and_defaults() -> None:
    body = PROTO.read_text("utf-8").partition("message Parameters {")[2]
    comments = {
        match[2]: " ".join(match[1].split("//")).strip()
        for match in re.finditer(r"((?:  //[^\n]*\n)+)  (?:optional \w+|repeated \w+) (\w+) =", body)
    }
    assert list(comments) == list(PARAMETERS)
    for name, parameter in PARAMETERS.items():
        comment = comments[name]
        if parameter.kind is Kind.TEXTS:
            assert f"At most {MAX_STOPS}, each 1 to {MAX_STOP_BYTES} bytes" in comment
            continue
        if parameter.kind is Kind.CHOICE:
            assert tuple(re.findall(r'"(\w+)"', comment)) == parameter.choices
            continue
        if span := re.search(r"(-?[\d.]+) to (-?[\d.]*\d)", comment):
            assert (parameter.minimum, parameter.maximum) == (float(span[1]), float(span[2])), name
        if above := re.search(r"Above (\d+), to (\d+)", comment):
            assert (parameter.minimum, parameter.maximum) == (float(above[1]), float(above[2]))
            assert parameter.above_minimum
        if least := re.search(r"At least (\d+)", comment):
            assert parameter.minimum == float(least[1])
        if default := re.search(r"Default (-?[\d.]*\d|true|false)", comment):
            words: dict[str, ParameterValue] = {"true": True, "false": False}
            expected = words[default[1]] if default[1] in words else float(default[1])
            assert parameter.default == expected, name
        else:
            assert name == "num_ctx", f"{name}: its default is said in a way that this test does not read"


def test_defaults_are_legal() -> None:
    for name, parameter in PARAMETERS.items():
        if parameter.default is not None:
            assert validate({name: parameter.default}) == {name: parameter.default}


def edges() -> list[tuple[str, object, bool]]:
    """Each bound of each number, and the next value beyond."""
    cases: list[tuple[str, object, bool]] = []
    for name, parameter in PARAMETERS.items():
        if parameter.minimum is None or parameter.maximum is None:
            continue
        step = 1 if parameter.kind is Kind.INT else 1e-6
        cases += [
            (name, parameter.minimum, not parameter.above_minimum),
            (name, parameter.minimum - step, False),
            (name, parameter.maximum, True),
            (name, parameter.maximum + step, False),
            (name, math.nan, False),
            (name, math.inf, False),
            (name, -math.inf, False),
            (name, True, False),
            (name, "1", False),
            (name, None, False),
            (name, 10**400, False),
            (name, -(10**400), False),
        ]
    return cases


@pytest.mark.parametrize(("name", "value", "legal"), edges())
def test_bounds(name: str, value: object, legal: bool) -> None:
    if legal:
        assert validate({name: value}) == {name: value}
        return
    with pytest.raises(InvalidRequest) as caught:
        validate({name: value})
    assert caught.value.metadata == {"field": name}
    assert PARAMETERS[name].legal in caught.value.message
    assert len(caught.value.message) < 200


def test_numbers_take_the_parameters_own_type() -> None:
    found = validate({"num_ctx": 4096.0, "temperature": 1})
    assert found == {"num_ctx": 4096, "temperature": 1.0}
    assert [type(value) for value in found.values()] == [int, float]
    with pytest.raises(InvalidRequest):
        validate({"num_ctx": 4096.5})


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ((), ()), (["x" * 512], ("x" * 512,)), (["é" * 256], ("é" * 256,))],
)
def test_stop_texts(value: object, expected: tuple[str, ...]) -> None:
    assert validate({"stop": value}) == {"stop": expected}


def test_a_thousand_stop_texts_are_legal() -> None:
    stops = [f"stop {index}" for index in range(1000)]
    assert validate({"stop": stops}) == {"stop": tuple(stops)}


@pytest.mark.parametrize(
    "value", ["", [""], ["x" * 513], ["é" * 257], ["a"] * 1025, [1], 5, None, {"a": 1}, ["\ud800"]]
)
def test_stop_texts_that_are_refused(value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate({"stop": value})
    assert caught.value.metadata["field"] == "stop"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("num_ctx", "8192", 8192),
        ("num_gpu", "-1", -1),
        ("seed", str(INT64_MAX), INT64_MAX),
        ("temperature", "0", 0.0),
        ("temperature", "1e-1", 0.1),
        ("use_mmap", "true", True),
        ("use_mmap", "FALSE", False),
        ("use_mmap", "1", True),
        ("use_mmap", "off", False),
        ("stop", "<|end|>", ("<|end|>",)),
        ("stop", "12", ("12",)),
        ("dry_sequence_breakers", "\n", ("\n",)),
        ("ignore_eos", "yes", True),
        ("xtc_threshold", "0.5", 0.5),
        ("draft_num_predict", "-1", -1),
    ],
)
def test_text(name: str, text: str, value: ParameterValue) -> None:
    parsed = parse_text(name, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("num_ctx", "4k"),
        ("num_ctx", "4096.5"),
        ("num_ctx", "4_096"),
        ("num_ctx", "\u0664"),
        ("num_ctx", ""),
        ("num_ctx", "9" * 5000),
        ("temperature", "nan"),
        ("temperature", "warm"),
        ("use_mmap", "maybe"),
        ("stop", ""),
        ("seed", "-2"),
        ("xtc_threshold", "0.51"),
        ("dry_base", "0.99"),
        ("dry_allowed_length", "0"),
        ("draft_num_predict", "65"),
        ("deterministic", "2"),
    ],
)
def test_text_that_is_refused(name: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_text(name, text)
    assert caught.value.metadata["field"] == name


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(InvalidRequest, match="unknown parameter `temprature`") as caught:
        validate({"temprature": 1})
    assert caught.value.hint == "did you mean `temperature`?"
    with pytest.raises(InvalidRequest) as caught:
        lookup("zzz\x1b")
    assert "num_ctx" in caught.value.hint
    assert caught.value.message.isprintable()


def test_names_of_other_engines_are_told_apart_from_typos() -> None:
    assert not IGNORED & set(PARAMETERS)
    with pytest.raises(InvalidRequest, match="`num_keep` is not supported"):
        validate({"num_keep": 4})


@given(st.sampled_from(sorted(PARAMETERS)), st.data())
def test_text_and_back(name: str, data: st.DataObject) -> None:
    parameter = PARAMETERS[name]
    if parameter.kind is Kind.TEXTS:
        text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=99))
        assert parse_text(name, text) == (text,)
        return
    low, high = parameter.minimum or 0, parameter.maximum or 1
    value: ParameterValue
    if parameter.kind is Kind.BOOL:
        value = data.draw(st.booleans())
    elif parameter.kind is Kind.CHOICE:
        value = data.draw(st.sampled_from(parameter.choices))
    elif parameter.kind is Kind.INT:
        value = data.draw(st.integers(int(low), int(high)))
    else:
        value = data.draw(st.floats(low, high, exclude_min=parameter.above_minimum))
    assert parse_text(name, format_value(value)) == value


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(PARAMETERS)), st.text(max_size=8)),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=5),
            st.lists(st.text(max_size=3), max_size=3),
        ),
        max_size=3,
    )
)
def test_anything_is_legal_or_a_typed_error(values: dict[str, object]) -> None:
    try:
        found = validate(values)
    except InvalidRequest:
        return
    assert validate(found) == found
