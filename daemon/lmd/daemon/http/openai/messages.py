"""From OpenAI's messages and tools to turns and functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from lmd.daemon.conversations import Tool, ToolCall, ToolChoice, Tools, Turn
from lmd.daemon.http.openai import requests
from lmd.registry.errors import InvalidRequest

#: What OpenAI calls a system prompt for models that reason.
_ROLES = {"developer": "system"}
_NOT_TEXT = {"image_url": "images", "input_audio": "audio", "file": "files"}
_CHOICES = {"auto": ToolChoice.AUTO, "none": ToolChoice.NONE, "required": ToolChoice.REQUIRED}


def turns_of(messages: Iterable[requests.ChatMessage]) -> list[Turn]:
    """Return the turns of a chat.

    Texts of several parts are joined by newlines, as llama-server and vLLM do it.

    Raises:
        InvalidRequest: a message has something that no model here reads, or a call that is none.
    """
    turns: list[Turn] = []
    names: dict[str, str] = {}
    for number, message in enumerate(messages):
        field = f"messages[{number}]"
        calls = tuple(_calls(message.tool_calls or (), field))
        names.update((call.id, call.name) for call in calls)
        result_of = message.tool_call_id or ""
        turns.append(
            Turn(
                _ROLES.get(message.role, message.role),
                _text(message, field),
                message.reasoning_content or message.reasoning or "",
                calls,
                (message.name or names.get(result_of, "")) if message.role == "tool" else "",
                result_of,
            )
        )
    return turns


def tools_of(request: requests.ChatRequest) -> Tools | None:
    """Return the functions of a request, None when it has none.

    Raises:
        InvalidRequest: a tool is no function, or the choice is none that there is.
    """
    for name in ("functions", "function_call"):
        if getattr(request, name):
            raise InvalidRequest(f"`{name}` is not supported", field=name, hint="use `tools` and `tool_choice`")
    if request.tools is None and request.tool_choice is None:
        return None
    tools = tuple(tool_of(tool, number) for number, tool in enumerate(request.tools or ()))
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return Tools(tools, _choice(choice or "auto"))
    if choice.type != "function" or choice.function is None:
        raise InvalidRequest("`tool_choice` must name a function", field="tool_choice")
    return Tools(tools, ToolChoice.REQUIRED, choice.function.name)


def _choice(text: str) -> ToolChoice:
    if text not in _CHOICES:
        raise InvalidRequest(
            f"`tool_choice` must be {', '.join(_CHOICES)} or a function, not {text[:40]!r}", field="tool_choice"
        )
    return _CHOICES[text]


def tool_of(tool: requests.ChatTool, number: int) -> Tool:
    """Return a function; *number* is its place in the request. Raises: InvalidRequest."""
    field = f"tools[{number}]"
    if tool.type != "function" or tool.function is None:
        raise InvalidRequest(f"`{field}` must be a function, not {tool.type[:40]!r}", field=f"{field}.type")
    function = tool.function
    parameters = "" if function.parameters is None else json.dumps(function.parameters, ensure_ascii=False)
    return Tool(function.name, function.description or "", parameters)


def _calls(calls: Sequence[requests.ToolCall], field: str) -> Iterable[ToolCall]:
    for number, call in enumerate(calls):
        where = f"{field}.tool_calls[{number}]"
        if call.function is None:
            raise InvalidRequest(f"`{where}` must call a function", field=where)
        arguments = call.function.arguments.strip() or "{}"
        try:
            is_object = isinstance(json.loads(arguments), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise InvalidRequest(
                f"`{where}.function.arguments` must be a JSON object as text", field=f"{where}.function.arguments"
            )
        yield ToolCall(call.id, call.function.name, arguments)


def _text(message: requests.ChatMessage, field: str) -> str:
    content = message.content
    if content is None:
        return message.refusal or ""
    if isinstance(content, str):
        return content
    return "\n".join(_part(part, f"{field}.content[{number}]") for number, part in enumerate(content))


def _part(part: requests.Part, field: str) -> str:
    if part.type in _NOT_TEXT:
        raise InvalidRequest(
            f"`{field}` is of type {part.type}: {_NOT_TEXT[part.type]} cannot be read",
            field=field,
            hint="send text only",
        )
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal") or text is None:
        raise InvalidRequest(f"`{field}` must be a text, not of type {part.type[:40]!r}", field=field)
    return text
