"""Errors as llama-server tells them: `{"error": {"code", "message", "type"}}`."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from lmd.daemon.errors import ContextLengthExceeded
from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.endpoint import Handler, endpoint
from lmd.registry.errors import LmdError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    503: "unavailable_error",
}


def llama_server_endpoint(handler: Handler) -> Handler:
    """Return *handler* with its errors in llama-server's shape."""
    return endpoint(handler, render_error)


def render_error(status: int, message: str, error: LmdError | BodyError | None) -> Response:
    """Return the answer to a failure; the code is the status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if isinstance(error, LmdError) and error.hint:
        message = f"{message}; {error.hint}"
    told: dict[str, object] = {"code": status, "message": message, "type": kind}
    if isinstance(error, ContextLengthExceeded):
        told |= {
            "type": "exceed_context_size_error",
            "n_prompt_tokens": int(error.metadata["prompt_tokens"]),
            "n_ctx": int(error.metadata["context_tokens"]),
        }
    return JSONResponse({"error": told}, status)
