"""Turns, functions and calls of functions between Ollama's shapes and those of `lmd.daemon.conversations`."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable, Sequence

from lmd.daemon.conversations import Tool, ToolCall, Tools, Turn
from lmd.daemon.http.ollama.requests import ChatMessage, ToolBody

_ID_CHARS = string.ascii_lowercase + string.digits
_ID_LENGTH = 8


def turns_of(messages: Iterable[ChatMessage]) -> list[Turn]:
    """Return the turns of a chat."""
    return [
        Turn(
            message.role,
            message.content or "",
            message.thinking or "",
            tuple(
                ToolCall(call.id or "", call.function.name or "", _json(call.function.arguments or {}))
                for call in message.tool_calls or ()
                if call.function is not None
            ),
            message.tool_name or "",
            message.tool_call_id or "",
        )
        for message in messages
    ]


def tools_of(tools: Sequence[ToolBody] | None) -> Tools | None:
    """Return the functions of a request, None when it has none."""
    functions = [tool.function for tool in tools or () if tool.function is not None]
    if not functions:
        return None
    return Tools(
        tuple(
            Tool(
                function.name or "",
                function.description or "",
                _json(function.parameters) if function.parameters else "",
            )
            for function in functions
        )
    )


def calls_shown(calls: Iterable[ToolCall], first_index: int) -> list[dict[str, object]]:
    """Return calls as clients get them: the arguments are an object; *first_index* counts those before."""
    return [
        {
            "id": call.id or new_call_id(),
            "function": {"index": index, "name": call.name, "arguments": arguments_shown(call.arguments)},
        }
        for index, call in enumerate(calls, first_index)
    ]


def arguments_shown(text: str) -> dict[str, object]:
    """Return the arguments of a call as an object; the parsers of calls give nothing else."""
    value = json.loads(text) if text.strip() else {}
    return value if isinstance(value, dict) else {"value": value}


def new_call_id() -> str:
    """Return an id for a call whose model gave it none."""
    return "call_" + "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
