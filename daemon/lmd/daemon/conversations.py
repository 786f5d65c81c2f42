"""The turns of a chat and what goes with them, and how they are put together for a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lmd.registry.errors import InvalidRequest
from lmd.registry.lm_config import Message
from lmd.runner.v1 import frames_pb2 as frames

ROLES = ("system", "user", "assistant", "tool")
MAX_TOOLS = 128
#: Bytes of the schemas of all tools of a request.
MAX_TOOL_BYTES = 1 << 20

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ToolChoice(StrEnum):
    """Whether functions are called; see `ToolChoice` of the API."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


class Think(StrEnum):
    """Whether a model thinks before it answers; see `Think` of the API."""

    OFF = "off"
    ON = "on"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function; *arguments* is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a chat: as a manifest's message, and what else a client can tell of it."""

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call; *parameters* is a JSON Schema as text, "" for any object."""

    name: str
    description: str = ""
    parameters: str = ""


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions of a request; *only* names the one that must be called."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice.AUTO
    only: str = ""

    def checked(self) -> Tools:
        """Return this when everything is in its range.

        Raises:
            InvalidRequest: something is not; *field* says what.
        """
        if len(self.tools) > MAX_TOOLS:
            raise InvalidRequest(f"`tools` has {len(self.tools)} functions, more than {MAX_TOOLS}", field="tools")
        names = [tool.name for tool in self.tools]
        for number, tool in enumerate(self.tools):
            _check_tool(number, tool, names)
        if sum(len(tool.parameters) + len(tool.description) for tool in self.tools) > MAX_TOOL_BYTES:
            raise InvalidRequest(f"`tools` are larger than {MAX_TOOL_BYTES} characters", field="tools")
        if self.only and self.only not in names:
            raise InvalidRequest(f"`tool_choice` names {self.only!a}, which is not in `tools`", field="tool_choice")
        if self.choice == ToolChoice.REQUIRED and not names:
            raise InvalidRequest("`tool_choice` asks for a call, but there are no `tools`", field="tool_choice")
        return self


def _check_tool(number: int, tool: Tool, names: Sequence[str]) -> None:
    field = f"tools[{number}]"
    if not _TOOL_NAME.fullmatch(tool.name):
        raise InvalidRequest(
            f"{tool.name!a} is no name for a function; it has 1 to 64 letters, digits, `_`, `-` and `.`",
            field=f"{field}.name",
        )
    if names.index(tool.name) != number:
        raise InvalidRequest(f"two functions have the name {tool.name!a}", field=f"{field}.name")
    if tool.parameters:
        try:
            schema = json.loads(tool.parameters)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the parameters of {tool.name!a} are not JSON: {error}", field=field) from error
        if not isinstance(schema, dict):
            raise InvalidRequest(f"the parameters of {tool.name!a} are no JSON Schema object", field=field)


def chat_turns(
    system: str | None, manifest_messages: Sequence[Message], messages: Sequence[Turn | Message]
) -> list[Turn | Message]:
    """Return the turns of a chat request; a system message that comes first replaces the manifest's *system*.

    Raises:
        InvalidRequest: there is no message, or one with an unknown role.
    """
    if not messages:
        raise InvalidRequest("a chat needs a message", field="messages")
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"message {number + 1} has role {message.role!a}, not one of {', '.join(ROLES)}",
                field=f"messages[{number}].role",
            )
    if messages[0].role == "system":
        return conversation(messages[0].content, manifest_messages, messages[1:])
    return conversation(system, manifest_messages, messages)


def conversation(
    system: str | None, manifest_messages: Sequence[Message], turns: Sequence[Turn | Message] = ()
) -> list[Turn | Message]:
    """Return the turns of a chat: the system prompt, if there is one, the manifest's messages, and *turns*.

    Every chat of a model begins with what this returns without *turns*, unless a request has its own system prompt;
    so a runner can keep that much for all callers.
    """
    first = [Message("system", system)] if system else []
    return [*first, *manifest_messages, *turns]


def chat_frame(
    messages: Iterable[Turn | Message],
    *,
    tools: Tools | None = None,
    think: Think | None = None,
    template: str = "",
    suffix: str = "",
) -> frames.Chat:
    """Return turns as a runner takes them."""
    chat = frames.Chat(messages=[_message_frame(message) for message in messages], template=template, suffix=suffix)
    if think is not None:
        chat.think = _THINK[think]
    if tools is not None and tools.choice != ToolChoice.NONE:
        chat.tools.extend(
            frames.Tool(name=tool.name, description=tool.description, parameters=tool.parameters)
            for tool in tools.tools
        )
        chat.tool_choice, chat.tool_name = _CHOICES[tools.choice], tools.only
    return chat


def _message_frame(message: Turn | Message) -> frames.ChatMessage:
    if isinstance(message, Message):
        return frames.ChatMessage(role=message.role, content=message.content)
    return frames.ChatMessage(
        role=message.role,
        content=message.content,
        thinking=message.thinking,
        tool_calls=[frames.ToolCall(id=c.id, name=c.name, arguments=c.arguments) for c in message.tool_calls],
        tool_name=message.tool_name,
        tool_call_id=message.tool_call_id,
    )


_CHOICES = {
    ToolChoice.AUTO: frames.TOOL_CHOICE_AUTO,
    ToolChoice.REQUIRED: frames.TOOL_CHOICE_REQUIRED,
}
_THINK = {
    Think.OFF: frames.THINK_OFF,
    Think.ON: frames.THINK_ON,
    Think.LOW: frames.THINK_LOW,
    Think.MEDIUM: frames.THINK_MEDIUM,
    Think.HIGH: frames.THINK_HIGH,
}
