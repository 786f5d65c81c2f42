"""Event streams whose events have names."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping

import structlog

from lmd.registry.errors import LmdError

log = structlog.get_logger(__name__)

MEDIA_TYPE = "text/event-stream"


def named_events(events: Iterable[Mapping[str, object]]) -> bytes:
    """Return events whose names are the `type` of their data, as responses and messages have it."""
    return b"".join(
        f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in events
    )


def told(error: Exception) -> LmdError:
    """Return what to tell of an error after the status went out; what nobody expected goes to the log."""
    if isinstance(error, LmdError) and error.reason != LmdError.reason:
        return error
    return defect(error)


def defect(error: Exception) -> LmdError:
    """Log what nobody expected, and return what the client is told: where to look."""
    error_id = secrets.token_hex(6)
    log.error("http_stream_failed", error_id=error_id, exc_info=error)
    return LmdError(f"internal error in the daemon; its log has more under error_id {error_id}")
