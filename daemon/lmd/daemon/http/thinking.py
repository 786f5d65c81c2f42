"""Chats with models that may not be able to think, for clients that set once what they want of all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from lmd.daemon.answer_events import Event
from lmd.daemon.conversations import Think
from lmd.registry.errors import CapabilityMissing

#: What clients call how much a model is to think; no template knows more than "high".
EFFORTS = {
    "none": Think.OFF,
    "minimal": Think.OFF,
    "low": Think.LOW,
    "medium": Think.MEDIUM,
    "high": Think.HIGH,
    "xhigh": Think.HIGH,
    "max": Think.HIGH,
}

Chat = Callable[[Think | None], AsyncGenerator[Event, None]]


async def think_if_it_can(chat: Chat, think: Think | None) -> AsyncGenerator[Event, None]:
    """Yield the answer of a chat that thinks as asked, or of one that is not asked where the model cannot."""
    try:
        async with aclosing(chat(think)) as events:
            async for event in events:
                yield event
        return
    except CapabilityMissing as error:
        if think is None or error.metadata["capability"] != "thinking":
            raise
    async with aclosing(chat(None)) as events:
        async for event in events:
            yield event
