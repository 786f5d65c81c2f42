"""Makes routes of handlers, with failures told as Ollama tells them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.endpoint import Handler, endpoint
from lmd.daemon.http.ollama.failures import Refusal, told
from lmd.daemon.http.ollama.replies import json_response, refused
from lmd.registry.errors import LmdError


def post(path: str, handler: Handler) -> Route:
    """Return a route for POST whose handler may raise `Refusal`."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Refusal as refusal:
            return refused(refusal)

    return Route(path, endpoint(handle, render_error), methods=["POST"])


def render_error(status: int, message: str, error: LmdError | BodyError | None) -> Response:
    """Tell of a failure that no handler has words for."""
    return json_response({"error": told(error) if isinstance(error, LmdError) else message}, status)
