"""Puts together the turns that a chat template renders."""

from __future__ import annotations

from collections.abc import Sequence

from lmd.registry.lm_config import Message
from lmd.runner.v1 import frames_pb2 as frames


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
