"""What a chat template is given: the turns, functions and wishes of a `Chat`, in the shapes that templates expect.

Source: the conventions of transformers' `apply_chat_template`, and what the templates of the families make of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Self

from lmd.runner.v1 import frames_pb2

# Mistral's templates refuse ids of any other length.
_SHORT_ID = re.compile(r"length\s*!=\s*9\b|length\s*==\s*9\b")
_SHORT_ID_CHARACTERS = 9
# Some templates have a word for no effort at all; they refuse those they do not know.
_NO_EFFORT = re.compile(r"""["'](none|no_think)["']""")
# What gpt-oss's template says to a turn that has all three of thoughts, content and calls.
_NOT_BOTH = "Cannot pass both content and thinking"

_EFFORTS = {
    frames_pb2.THINK_LOW: "low",
    frames_pb2.THINK_MEDIUM: "medium",
    frames_pb2.THINK_HIGH: "high",
}


class Arguments(dict[str, Any]):
    """The arguments of a call: an object for templates that go through them, JSON for those that put them in a text.

    Some templates were written for the one, some for the other, and none says which.
    """

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


class NoContent(str):
    """The content of a turn that only calls functions: "" for templates that read it, none for those that ask.

    Some templates find calls only where the content is none, others search it without asking.
    """

    __slots__ = ()

    def __new__(cls) -> Self:
        """Return it: there is one value only."""
        return super().__new__(cls, "")


class NoTools(tuple[()]):
    """What a chat without functions has: none for templates that ask, nothing for those that go through it."""

    __slots__ = ()


def is_none(value: object) -> bool:
    """Return what the test `none` of templates says."""
    return value is None or isinstance(value, NoContent | NoTools)


def template_values(chat: frames_pb2.Chat, template: str) -> dict[str, Any]:
    """Return the variables that *template* gets for a chat.

    Raises:
        RecursionError: JSON in it nests too deeply.
    """
    tools = [] if chat.tool_choice == frames_pb2.TOOL_CHOICE_NONE else [_tool(tool) for tool in chat.tools]
    messages = _messages(chat, short_ids=_SHORT_ID.search(template) is not None)
    if _NOT_BOTH in template:
        for message in messages:
            _join_thoughts(message)
    return {
        "messages": messages,
        "tools": tools or NoTools(),
        "documents": None,
        "add_generation_prompt": True,
        **_thinking(chat.think, template),
    }


def _thinking(think: frames_pb2.Think.ValueType, template: str) -> dict[str, Any]:
    """Return the variables with which templates are told to think; none without a wish, so that their defaults hold."""
    if think == frames_pb2.THINK_UNSPECIFIED:
        return {}
    on = think != frames_pb2.THINK_OFF
    values: dict[str, Any] = {"enable_thinking": on, "thinking": on}
    no_effort = _NO_EFFORT.search(template)
    if think in _EFFORTS:
        values["reasoning_effort"] = _EFFORTS[think]
    elif not on:
        values["thinking_budget"] = 0
        # Models that always think can at least think little.
        values["reasoning_effort"] = no_effort[1] if no_effort else "low"
    elif no_effort:
        values["reasoning_effort"] = "high"
    return values


def _join_thoughts(message: dict[str, Any]) -> None:
    """Take what a turn with calls says as a part of its thoughts."""
    if message["content"] and "tool_calls" in message and "thinking" in message:
        message["thinking"] = message["reasoning_content"] = f"{message['thinking']}\n\n{message['content']}"
        message["content"] = NoContent()


def _tool(tool: frames_pb2.Tool) -> dict[str, Any]:
    parameters = _json(tool.parameters) if tool.parameters else {}
    if isinstance(parameters, dict):
        # Templates go through them without asking.
        parameters = {"type": "object", "properties": {}} | parameters
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _messages(chat: frames_pb2.Chat, *, short_ids: bool) -> list[dict[str, Any]]:
    """Return the turns. A result that does not say which call it is for belongs to the first without one."""
    messages: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []
    for number, turn in enumerate(chat.messages):
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.thinking:
            message["reasoning_content"] = message["thinking"] = turn.thinking
        if turn.tool_calls:
            message["content"] = turn.content or NoContent()
            calls = [
                (call.id or f"call_{number}_{place}", call.name, _arguments(call.arguments))
                for place, call in enumerate(turn.tool_calls)
            ]
            open_calls = [(id_, name) for id_, name, _ in calls]
            message["tool_calls"] = [
                {"id": _call_id(id_, short_ids), "type": "function", "function": {"name": name, "arguments": arguments}}
                for id_, name, arguments in calls
            ]
        if turn.role == "tool":
            id_, name = _answered_call(turn, open_calls)
            if name:
                message["name"] = name
            if id_:
                message["tool_call_id"] = _call_id(id_, short_ids)
        messages.append(message)
    return messages


def _answered_call(turn: frames_pb2.ChatMessage, open_calls: list[tuple[str, str]]) -> tuple[str, str]:
    """Return the id and the name of the call that a result is for, and take that off *open_calls*."""
    for place, (id_, name) in enumerate(open_calls):
        if turn.tool_call_id in ("", id_) and turn.tool_name in ("", name):
            del open_calls[place]
            return id_, name
    return turn.tool_call_id, turn.tool_name


def _call_id(id_: str, short: bool) -> str:
    if not short or (len(id_) == _SHORT_ID_CHARACTERS and id_.isalnum()):
        return id_
    return hashlib.sha256(id_.encode()).hexdigest()[:_SHORT_ID_CHARACTERS]


def _arguments(text: str) -> Any:
    value = _json(text) if text else {}
    return Arguments(value) if isinstance(value, dict) else text


def _json(text: str) -> Any:
    """Return what JSON says, or the text if it is none: that is what the model said then."""
    try:
        return json.loads(text)
    except ValueError:
        return text
