"""The adapters of the gateway: what each answers, and how failures look below its paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.endpoint import RenderError
from lmd.daemon.http.ollama import blobs, chat, create, embed, generate, listing, manage, pull, show
from lmd.daemon.http.services import Services
from lmd.registry.errors import LmdError

Adapter = Callable[[Services], Sequence[BaseRoute]]

#: In the order in which routes are tried.
ADAPTERS: tuple[Adapter, ...] = (
    listing.routes,
    generate.routes,
    chat.routes,
    embed.routes,
    show.routes,
    pull.routes,
    create.routes,
    blobs.routes,
    manage.routes,
)

#: Path prefix → how failures are told below it that no endpoint sees: who may not ask, unknown paths, wrong verbs.
#: The longest prefix that fits wins; paths without one are Ollama's.
RENDERERS: dict[str, RenderError] = {}

#: What sees every request, also those that the guard refuses: ASGI middleware, the last one outermost.
WATCHERS: tuple[Callable[[Services, ASGIApp], ASGIApp], ...] = ()


def render_plain(status: int, message: str, error: LmdError | BodyError | None) -> Response:
    """Tell of a failure in Ollama's way."""
    return JSONResponse({"error": message}, status_code=status)


def renderer_of(path: str, renderers: Mapping[str, RenderError]) -> RenderError | None:
    """Return how failures at *path* are told; None where no adapter says."""
    fitting = [prefix for prefix in renderers if path == prefix.rstrip("/") or path.startswith(prefix)]
    return renderers[max(fitting, key=len)] if fitting else None
