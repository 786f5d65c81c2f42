"""Errors in OpenAI's envelope: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json

from starlette.responses import Response

from lmd.daemon.errors import QueueFull
from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.endpoint import Handler, endpoint
from lmd.daemon.http.errors import retry_after, status_of
from lmd.registry.errors import InvalidRequest, LmdError

#: OpenAI's own codes, which clients compare; the others are our reasons in lower case.
_CODES = {
    "CONTEXT_LENGTH_EXCEEDED": "context_length_exceeded",
    "MODEL_NOT_FOUND": "model_not_found",
    "QUEUE_FULL": "rate_limit_exceeded",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
#: What the API calls the fields that the application has other names for.
_PARAMS = {
    "choices": "n",
    "format": "response_format",
    "inputs": "input",
    "num_predict": "max_tokens",
    "stop_tokens": "stop",
    "tokens": "prompt",
}
#: The field that an error is about which names none.
_PARAM_OF_REASON = {
    "CONTEXT_LENGTH_EXCEEDED": "messages",
    "INVALID_MODEL_REF": "model",
    "MODEL_NOT_FOUND": "model",
}
_PARAM_OF_CAPABILITY = {"insert": "suffix", "thinking": "reasoning_effort", "tools": "tools"}


def openai_endpoint(handler: Handler) -> Handler:
    """Return *handler* with its errors in OpenAI's envelope."""
    return endpoint(handler, render_error)


def render_error(status: int, message: str, error: LmdError | BodyError | None) -> Response:
    """Return the answer to a failure.

    A full queue is told apart: 429 when the caller fills it alone and has to slow down, 503 when everybody does and the
    server has too much to do; clients wait as Retry-After says, and try again, in both cases.
    """
    status = _status(status, error)
    headers = {}
    if isinstance(error, LmdError) and (value := retry_after(error)):
        headers["retry-after"] = value
    return Response(
        json.dumps({"error": error_object(status, message, error)}, ensure_ascii=False),
        status,
        headers,
        media_type="application/json",
    )


def error_event(error: LmdError) -> bytes:
    """Return the event that ends a stream which has begun; OpenAI's own client raises it as `APIError`."""
    told = error_object(_status(status_of(error), error), error.message, error)
    return b"data: " + json.dumps({"error": told}, ensure_ascii=False).encode() + b"\n\n"


def error_object(status: int, message: str, error: LmdError | BodyError | None) -> dict[str, object]:
    """Return what the envelope holds; the hint is part of the message, as clients show nothing else."""
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    param: str | None = None
    code: str | None = None
    if isinstance(error, BodyError):
        param = error.field or None
    elif error is not None:
        param = _param(error)
        if not isinstance(error, InvalidRequest):
            code = _CODES.get(error.reason, error.reason.lower())
        if error.hint:
            message = f"{message}; {error.hint}"
    return {"message": message, "type": kind, "param": param, "code": code}


def _status(status: int, error: LmdError | BodyError | None) -> int:
    return 429 if isinstance(error, QueueFull) and error.own else status


def _param(error: LmdError) -> str | None:
    if isinstance(error, InvalidRequest):
        field = error.metadata["field"]
        return _PARAMS.get(field, field)
    if error.reason == "CAPABILITY_MISSING":
        return _PARAM_OF_CAPABILITY.get(error.metadata.get("capability", ""), "model")
    return _PARAM_OF_REASON.get(error.reason)
