"""Counts the requests that come through HTTP."""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmd.daemon.http.services import Services
from lmd.daemon.metrics import Metrics, Request
from lmd.daemon.outcomes import CANCELLED, OK

#: Where the route that a request took stands in its scope.
ROUTE_KEY = "route"
#: Instead of the route of a request that has none, or was refused before it got to one.
NO_ROUTE = "none"

#: The beginnings of paths by whose API they are; the longest that fits wins.
_APIS = {
    "/": "ollama",
    "/metrics": "lmd",
    "/v1/": "openai",
    "/v1/messages": "anthropic",
    "/v1/rerank": "llama_server",
    "/rerank": "llama_server",
    "/tokenize": "llama_server",
    "/detokenize": "llama_server",
    "/apply-template": "llama_server",
}
_OF_STATUS = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    499: CANCELLED,
    500: "INTERNAL",
}
_CONVERTOR = re.compile(r"\{(\w+):\w+\}")


@functools.cache
def template_of(path: str) -> str:
    """Return the path of a route as documentation writes it: `/v1/models/{id}`."""
    return _CONVERTOR.sub(r"{\1}", path)


@functools.cache
def api_of(template: str) -> str:
    """Return the name of the API that a path belongs to."""
    return _APIS[max((prefix for prefix in _APIS if template.startswith(prefix)), key=len, default="/")]


class CountRequests:
    """Counts and times what *app* answers, by the route that it took. Outermost, so that it sees all."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0
        complete = False

        # Not a coroutine of its own: what it adds to each token is a comparison.
        def watched(message: Message) -> Awaitable[None]:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                complete = True
            return send(message)

        with self._metrics.request("http") as request:
            try:
                await self._app(scope, receive, watched)
            finally:
                self._name(request, scope)
            if request.outcome.text == OK:
                request.outcome.text = _outcome(status) if complete else CANCELLED

    def _name(self, request: Request, scope: Scope) -> None:
        """Say which route the request took; the names are those of routes, never what the caller wrote."""
        route = scope.get(ROUTE_KEY)
        if not isinstance(route, Route):
            request.api, request.route = NO_ROUTE, NO_ROUTE
            return
        request.route = template_of(route.path)
        request.api = api_of(request.route)


def count_requests(services: Services, app: ASGIApp) -> ASGIApp:
    """Return *app* with its requests counted."""
    return CountRequests(app, services.metrics)


def _outcome(status: int) -> str:
    if status < 400:
        return OK
    return _OF_STATUS.get(status, f"http_{status}")
