"""The routes of all adapters as one ASGI application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lmd.daemon.http.adapters import ADAPTERS, RENDERERS, WATCHERS, Adapter, render_plain, renderer_of
from lmd.daemon.http.endpoint import RenderError
from lmd.daemon.http.gateway import HttpApplication
from lmd.daemon.http.services import Services


def make_app(
    services: Services,
    adapters: Sequence[Adapter] = ADAPTERS,
    renderers: Mapping[str, RenderError] = RENDERERS,
) -> Routes:
    """Return what answers the paths of *adapters*; nothing guards it yet."""
    return Routes([route for adapter in adapters for route in adapter(services)], renderers)


def make_http(services: Services) -> HttpApplication:
    """Return what the gateway serves."""
    app = make_app(services)

    def watch(guarded: ASGIApp) -> ASGIApp:
        for watcher in WATCHERS:
            guarded = watcher(services, guarded)
        return guarded

    return HttpApplication(app, app.failure, watch)


class Routes:
    """Sends requests to their routes, and answers those that have none.

    That is 404 for an unknown path, 405 for a verb that the path does not have, and a redirect where the path lacks a
    slash at its end or has one too many. Paths without parameters are found without trying all routes.
    """

    def __init__(self, routes: Sequence[BaseRoute], renderers: Mapping[str, RenderError]) -> None:
        self._renderers = renderers
        self._by_path: dict[str, list[BaseRoute]] = {}
        self._others: list[BaseRoute] = []
        for route in routes:
            if isinstance(route, Route) and not route.param_convertors:
                self._by_path.setdefault(route.path, []).append(route)
            else:
                self._others.append(route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route, allowed = self._find(scope)
        if route is not None:
            await route.handle(scope, receive, send)
            return
        path: str = scope["path"]
        if allowed:
            response = self._no_route(path, 405, "405 method not allowed")
            response.headers["allow"] = ", ".join(sorted(allowed))
        else:
            response = self._redirect(scope) or self._no_route(path, 404, "404 page not found")
        await response(scope, receive, send)

    def _find(self, scope: Scope) -> tuple[BaseRoute | None, set[str]]:
        """Return the route of a request, which changes *scope*; or None, and the verbs that its path has."""
        allowed: set[str] = set()
        for route in [*self._by_path.get(scope["path"], ()), *self._others]:
            match, more = route.matches(scope)
            if match == Match.FULL:
                scope.update(more)
                scope["route"] = route
                return route, allowed
            if match == Match.PARTIAL:
                allowed |= getattr(route, "methods", None) or set()
        return None, allowed

    def _redirect(self, scope: Scope) -> Response | None:
        path: str = scope["path"]
        other = path[:-1] if path.endswith("/") else f"{path}/"
        # Only to paths of ours, and never to what a browser would take for another host.
        if other not in self._by_path or other.startswith("//"):
            return None
        query = scope["query_string"].decode("latin-1")
        status = 301 if scope["method"] in ("GET", "HEAD") else 307
        return Response(status_code=status, headers={"location": f"{other}?{query}" if query else other})

    def failure(self, path: str, status: int, message: str) -> Response:
        """Return the answer to what failed before any route, in the shape of the path's adapter."""
        return (renderer_of(path, self._renderers) or render_plain)(status, message, None)

    def _no_route(self, path: str, status: int, text: str) -> Response:
        """Return the answer to what has no route, which is plain text where no adapter says otherwise."""
        render = renderer_of(path, self._renderers)
        return PlainTextResponse(text, status_code=status) if render is None else render(status, text, None)
