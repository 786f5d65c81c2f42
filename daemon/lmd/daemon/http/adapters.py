"""The adapters of the gateway: what each answers, and how failures look below its paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from lmd.daemon.http import metrics
from lmd.daemon.http.anthropic import errors as anthropic_errors
from lmd.daemon.http.anthropic import messages
from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.counting import count_requests
from lmd.daemon.http.endpoint import RenderError
from lmd.daemon.http.llama_server import errors as llama_server_errors
from lmd.daemon.http.llama_server import requests as llama_server_requests
from lmd.daemon.http.llama_server import rerank, tokens
from lmd.daemon.http.ollama import blobs, create, embed, generate, listing, manage, pull, show
from lmd.daemon.http.ollama import chat as ollama_chat
from lmd.daemon.http.openai import chat as openai_chat
from lmd.daemon.http.openai import completions, embeddings, models, responses
from lmd.daemon.http.openai import errors as openai_errors
from lmd.daemon.http.services import Services
from lmd.registry.errors import LmdError

Adapter = Callable[[Services], Sequence[BaseRoute]]

#: In the order in which routes are tried.
ADAPTERS: tuple[Adapter, ...] = (
    *(generate.routes, ollama_chat.routes, embed.routes),
    *(listing.routes, show.routes, pull.routes, create.routes, blobs.routes, manage.routes),
    *(openai_chat.routes, completions.routes, embeddings.routes, models.routes, responses.routes),
    messages.routes,
    *(rerank.routes, tokens.routes),
    metrics.routes,
)

#: Path prefix → how failures are told below it that no endpoint sees: who may not ask, unknown paths, wrong verbs.
#: The longest prefix that fits wins; paths without one are Ollama's.
RENDERERS: dict[str, RenderError] = {
    "/v1/": openai_errors.render_error,
    "/v1/messages": anthropic_errors.render_error,
    **dict.fromkeys(llama_server_requests.REQUESTS, llama_server_errors.render_error),
}

#: What sees every request, also those that the guard refuses: ASGI middleware, the last one outermost.
WATCHERS: tuple[Callable[[Services, ASGIApp], ASGIApp], ...] = (count_requests,)


def render_plain(status: int, message: str, error: LmdError | BodyError | None) -> Response:
    """Tell of a failure in Ollama's way."""
    return JSONResponse({"error": message}, status_code=status)


def renderer_of(path: str, renderers: Mapping[str, RenderError]) -> RenderError | None:
    """Return how failures at *path* are told; None where no adapter says."""
    fitting = [prefix for prefix in renderers if path == prefix.rstrip("/") or path.startswith(prefix)]
    return renderers[max(fitting, key=len)] if fitting else None
