"""What a Go template is given for a chat: the variables of Ollama's templates, with the shapes they have there.

Source: Ollama's documentation of its templates. Functions are written in the order of Ollama's own types, and what
those do not know follows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmd.gotemplate.values import JsonList, JsonMap, Struct, Value
from lmd.runner.v1 import frames_pb2

_LEVELS = {frames_pb2.THINK_LOW: "low", frames_pb2.THINK_MEDIUM: "medium", frames_pb2.THINK_HIGH: "high"}
_TYPESCRIPT = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "array": "any[]",
    "object": "Record<string, any>",
    "null": "null",
}
# Names of a schema, in the order in which Ollama writes them.
_PARAMETERS = ("type", "$defs", "items", "required", "properties")
_PROPERTY = ("anyOf", "type", "items", "description", "enum", "properties", "required")


def thinking_values(chat: frames_pb2.Chat) -> dict[str, Value]:
    """Return the variables with which a template is told to think."""
    return {
        "Think": chat.think not in (frames_pb2.THINK_UNSPECIFIED, frames_pb2.THINK_OFF),
        "ThinkLevel": _LEVELS.get(chat.think, ""),
        "IsThinkSet": chat.think != frames_pb2.THINK_UNSPECIFIED,
    }


def tool_values(chat: frames_pb2.Chat) -> JsonList:
    """Return `.Tools`; empty when none is to be called.

    Raises:
        RecursionError: a schema nests too deeply.
    """
    if chat.tool_choice == frames_pb2.TOOL_CHOICE_NONE:
        return JsonList()
    return JsonList(_tool(tool) for tool in chat.tools)


def message_values(turns: Sequence[frames_pb2.ChatMessage]) -> list[Value]:
    """Return `.Messages`: turns that follow each other in one role are one, but for results of functions."""
    merged: list[frames_pb2.ChatMessage] = []
    names: dict[str, str] = {}
    for turn in turns:
        for call in turn.tool_calls:
            names[call.id] = call.name
        if merged and merged[-1].role == turn.role and turn.role != "tool":
            joined = frames_pb2.ChatMessage()
            joined.CopyFrom(merged[-1])
            joined.content = f"{joined.content}\n\n{turn.content}"
            if turn.tool_calls and not joined.tool_calls:
                joined.tool_calls.extend(turn.tool_calls)
            joined.thinking = joined.thinking or turn.thinking
            merged[-1] = joined
        else:
            merged.append(turn)
    return [_message(turn, names) for turn in merged]


def system_text(turns: Sequence[frames_pb2.ChatMessage]) -> str:
    """Return `.System` of templates that go through the turns themselves: all that system turns say."""
    return "\n\n".join(turn.content for turn in turns if turn.role == "system")


def _message(turn: frames_pb2.ChatMessage, names: Mapping[str, str]) -> Struct:
    calls = [_call(number, call) for number, call in enumerate(turn.tool_calls)]
    tool_name = turn.tool_name or (names.get(turn.tool_call_id, "") if turn.role == "tool" else "")
    shown: dict[str, Value] = {"role": turn.role, "content": turn.content}
    optional = {
        "thinking": turn.thinking,
        "tool_calls": [call.json for call in calls],
        "tool_name": tool_name,
        "tool_call_id": turn.tool_call_id,
    }
    shown |= {key: value for key, value in optional.items() if value}
    fields: dict[str, Value] = {
        "Role": turn.role,
        "Content": turn.content,
        "Thinking": turn.thinking,
        "Images": [],
        "ToolCalls": calls,
        "ToolName": tool_name,
        "ToolCallID": turn.tool_call_id,
    }
    return Struct("Message", fields, json=shown)


def _call(number: int, call: frames_pb2.ToolCall) -> Struct:
    arguments = JsonMap(_go_value(_object(call.arguments)))
    function = {"index": number, "name": call.name, "arguments": _sorted(arguments)}
    fields: dict[str, Value] = {
        "ID": call.id,
        "Function": Struct(
            "ToolCallFunction", {"Index": number, "Name": call.name, "Arguments": arguments}, json=function
        ),
    }
    return Struct("ToolCall", fields, json={"id": call.id, "function": function} if call.id else {"function": function})


def _tool(tool: frames_pb2.Tool) -> Struct:
    schema = {"type": "object", "properties": {}} | _object(tool.parameters)
    properties = schema["properties"] if isinstance(schema["properties"], dict) else {}
    ordered = {name: _ordered(properties[name], _PROPERTY) for name in sorted(properties, key=str.encode)}
    shown_parameters = _ordered(schema | {"properties": ordered}, _PARAMETERS)
    parameters = Struct(
        "ToolFunctionParameters",
        {
            "Type": _go_value(schema["type"]),
            "Defs": _go_value(schema.get("$defs")),
            "Items": _go_value(schema.get("items")),
            "Required": _listed(schema.get("required")),
            "Properties": JsonMap({name: _property(value) for name, value in ordered.items()}),
        },
        json=shown_parameters,
        writes_json=True,
    )
    described = {"description": tool.description} if tool.description else {}
    shown = {"name": tool.name, **described, "parameters": shown_parameters}
    function = Struct(
        "ToolFunction",
        {"Name": tool.name, "Description": tool.description, "Parameters": parameters},
        json=shown,
        writes_json=True,
    )
    fields: dict[str, Value] = {"Type": "function", "Items": None, "Function": function}
    return Struct("Tool", fields, json={"type": "function", "function": shown}, writes_json=True)


def _property(schema: Value) -> Struct:
    known = schema if isinstance(schema, dict) else {}
    type_ = known.get("type")
    names = [name for name in (type_ if isinstance(type_, list) else [type_]) if isinstance(name, str)]
    fields: dict[str, Value] = {
        "AnyOf": [_property(other) for other in _listed(known.get("anyOf"))],
        # One type is written as its name, several as a list.
        "Type": names[0] if len(names) == 1 else names,
        "Items": _go_value(known.get("items")),
        "Description": known.get("description") or "",
        "Enum": _go_value(_listed(known.get("enum"))),
    }
    return Struct("ToolProperty", fields, json=schema, typescript=_typescript(known, names))


def _typescript(schema: Mapping[str, Any], names: Sequence[str]) -> str:
    several = [other for other in _listed(schema.get("anyOf")) if isinstance(other, dict)]
    if several:
        types = []
        for other in several:
            type_ = other.get("type")
            types.append(_typescript(other, [type_] if isinstance(type_, str) else _listed(type_)))
        return " | ".join(types)
    return " | ".join(_TYPESCRIPT.get(str(name), "any") for name in names) or "any"


def _ordered(value: Any, names: Sequence[str]) -> Any:
    """Return a schema with *names* first, in their order."""
    if not isinstance(value, dict):
        return value
    known = {name: value[name] for name in names if name in value}
    if isinstance(known.get("properties"), dict) and names is _PROPERTY:
        known["properties"] = {
            name: _ordered(known["properties"][name], _PROPERTY) for name in sorted(known["properties"], key=str.encode)
        }
    if isinstance(known.get("anyOf"), list):
        known["anyOf"] = [_ordered(other, _PROPERTY) for other in known["anyOf"]]
    for name in ("items", "$defs"):
        if name in known:
            known[name] = _sorted(known[name])
    return known | {name: _sorted(value[name]) for name in sorted(value, key=str.encode) if name not in names}


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value, key=str.encode)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _go_value(value: Any) -> Any:
    """Return JSON as Go has it: all numbers are floating point, but for those that would lose digits."""
    if isinstance(value, dict):
        return {key: _go_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_go_value(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1 << 53:
        return float(value)
    return value


def _object(text: str) -> dict[str, Any]:
    """Return the object that JSON says; nothing where it is none, as there is no place for other values."""
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
