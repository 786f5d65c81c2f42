"""Puts together the turns that a chat template renders."""

from __future__ import annotations

from collections.abc import Sequence

from lmd.registry.errors import InvalidRequest
from lmd.registry.lm_config import Message
from lmd.runner.v1 import frames_pb2 as frames

ROLES = ("system", "user", "assistant", "tool")


def chat_turns(system: str | None, manifest_messages: Sequence[Message], messages: Sequence[Message]) -> list[Message]:
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
    system: str | None, manifest_messages: Sequence[Message], turns: Sequence[Message] = ()
) -> list[Message]:
    """Return the turns of a chat: the system prompt, if there is one, the manifest's messages, and *turns*.

    Every chat of a model begins with what this returns without *turns*, unless a request has its own system prompt;
    so a runner can keep that much for all callers.
    """
    first = [Message("system", system)] if system else []
    return [*first, *manifest_messages, *turns]


def chat_frame(messages: Sequence[Message]) -> frames.Chat:
    """Return turns as a runner takes them."""
    return frames.Chat(messages=[frames.ChatMessage(role=m.role, content=m.content) for m in messages])
