"""Errors in Anthropic's envelope: `{"type": "error", "error": {"type", "message"}, "request_id"}`."""

from __future__ import annotations

import secrets

from starlette.responses import JSONResponse, Response

from lmd.daemon.errors import QueueFull
from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.errors import status_of
from lmd.registry.errors import LmdError

#: What Anthropic answers when its servers have too much to do.
OVERLOADED = 529

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


def new_request_id() -> str:
    """Return the id under which a client can tell of a request."""
    return f"req_{secrets.token_hex(12)}"


def render_error(
    status: int, message: str, error: LmdError | BodyError | None, *, request_id: str | None = None
) -> Response:
    """Return the answer to a failure."""
    request_id = request_id or new_request_id()
    status = _status(status, error)
    body = error_object(status, message, error, request_id)
    return JSONResponse(body, status_code=status, headers={"request-id": request_id})


def error_event(error: LmdError, request_id: str) -> dict[str, object]:
    """Return the event that ends a stream which has begun."""
    return error_object(_status(status_of(error), error), error.message, error, request_id)


def error_object(status: int, message: str, error: LmdError | BodyError | None, request_id: str) -> dict[str, object]:
    """Return the envelope; the hint is part of the message, as clients show nothing else."""
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    if isinstance(error, LmdError) and error.hint:
        message = f"{message}; {error.hint}"
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def _status(status: int, error: LmdError | BodyError | None) -> int:
    if isinstance(error, QueueFull) and error.own:
        return 429
    return OVERLOADED if status == 503 else status
