"""Frames of event streams."""

from __future__ import annotations

import json
from collections.abc import Mapping

MEDIA_TYPE = "text/event-stream"


def named_event(event: Mapping[str, object]) -> bytes:
    """Return an event whose name is the `type` of its data, as OpenAI's responses and Anthropic's messages have it."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()
