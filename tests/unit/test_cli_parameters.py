"""Settings typed by people: every field of the wire's Parameters, by name and type."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import FieldDescriptor

from lmd.cli.errors import BadUsage
from lmd.cli.parameters import NAMES, parse_options
from lmd.cli.shapes import parameters_json
from lmd.v1 import model_pb2

_FIELDS = list(model_pb2.Parameters.DESCRIPTOR.fields)


@pytest.mark.parametrize("field", _FIELDS, ids=lambda field: str(field.name))
def test_every_field_can_be_set_and_comes_back(field: FieldDescriptor) -> None:
    text, value = {
        FieldDescriptor.TYPE_BOOL: ("false", False),
        FieldDescriptor.TYPE_STRING: ("<|end|>", ["<|end|>"]),
        FieldDescriptor.TYPE_FLOAT: ("0.7", 0.7),
    }.get(field.type, ("3", 3))
    if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
        text, value = "q8_0", "q8_0"
    parameters = parse_options([f"{field.name}={text}"])
    assert parameters_json(parameters) == {field.name: value}


def test_zero_is_set_and_not_left_out() -> None:
    assert parse_options(["temperature=0", "seed=-1"]).HasField("temperature")


def test_the_last_value_wins_and_a_list_grows() -> None:
    parameters = parse_options(["top_k=1", "stop=a", "top_k=2", "stop=b=c", "stop= d "])
    assert parameters.top_k == 2
    assert list(parameters.stop) == ["a", "b=c", " d "]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("temperature", "has no value"),
        ("temprature=1", "unknown parameter `temprature`"),
        ("top_k=many", "`top_k` must be a whole number, not `many`"),
        ("top_k=1.5", "whole number"),
        ("top_k=99999999999", "whole number"),
        ("temperature=warm", "`temperature` must be a number"),
        ("temperature=nan", "must be a number"),
        ("use_mmap=maybe", "must be true or false"),
    ],
)
def test_what_does_not_parse_is_named(option: str, message: str) -> None:
    with pytest.raises(BadUsage) as refused:
        parse_options([option])
    assert message in refused.value.message


def test_close_names_are_offered_and_otherwise_all() -> None:
    with pytest.raises(BadUsage) as close:
        parse_options(["Temprature=1"])
    assert "`temperature`" in close.value.hint
    with pytest.raises(BadUsage) as far:
        parse_options(["zzz=1"])
    assert all(name in far.value.hint for name in NAMES)
