"""Engine settings typed by people, checked against the fields of the wire's `Parameters`.

Ranges are the daemon's business; here only names and types are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from google.protobuf.descriptor import FieldDescriptor

from lmd.cli.errors import BadUsage
from lmd.v1 import model_pb2

_INTEGERS = (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT32)
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

NAMES: tuple[str, ...] = tuple(model_pb2.Parameters.DESCRIPTOR.fields_by_name)


def parse_options(options: Sequence[str]) -> model_pb2.Parameters:
    """Return the settings of `-o KEY=VALUE` options; a list grows with each option, of others the last wins.

    Raises:
        BadUsage: an option has no value, an unknown name, or a value of the wrong type.
    """
    parameters = model_pb2.Parameters()
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise BadUsage(f"`-o {option}` has no value", hint="write `-o KEY=VALUE`, such as `-o temperature=0`")
        set_parameter(parameters, name.strip(), [value])
    return parameters


def set_parameter(parameters: model_pb2.Parameters, name: str, values: Sequence[str]) -> None:
    """Set *name* from text, or add to it when it is a list.

    Raises:
        BadUsage: the name is unknown or the value has the wrong type.
    """
    field = model_pb2.Parameters.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        raise BadUsage(f"unknown parameter `{name}`", hint=_suggestion(name))
    if field.is_repeated:
        getattr(parameters, name).extend(values)
        return
    if len(values) != 1:
        raise BadUsage(f"`{name}` takes one value", hint=f"write `{name}` and {_kind(field)}")
    try:
        setattr(parameters, name, _typed(field, values[0].strip()))
    except ValueError:
        raise BadUsage(f"`{name}` must be {_kind(field)}, not `{values[0]}`") from None


def _typed(field: FieldDescriptor, text: str) -> int | float | bool | str:
    if field.type == FieldDescriptor.TYPE_STRING:
        return text
    if field.type == FieldDescriptor.TYPE_BOOL:
        try:
            return _BOOLEANS[text.lower()]
        except KeyError:
            raise ValueError(text) from None
    if field.type in _INTEGERS:
        return int(text)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _kind(field: FieldDescriptor) -> str:
    if field.type == FieldDescriptor.TYPE_STRING:
        return "a word"
    if field.type == FieldDescriptor.TYPE_BOOL:
        return "true or false"
    return "a whole number" if field.type in _INTEGERS else "a number"


def _suggestion(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name.lower(), NAMES, n=3)
    if close:
        return f"did you mean {' or '.join(f'`{other}`' for other in close)}?"
    return f"the parameters are {', '.join(NAMES)}"
