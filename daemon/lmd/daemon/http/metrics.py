"""`GET /metrics`: what the daemon counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.endpoint import endpoint
from lmd.daemon.http.services import Services
from lmd.registry.errors import LmdError


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the route."""

    async def metrics(request: Request) -> Response:
        scrape = services.metrics.scrape()
        accept = request.headers.get("accept", "")
        # A few milliseconds of text, which no answer has to wait for.
        body, media_type = await services.pool.run(scrape.render, accept)
        return Response(body, headers={"content-type": media_type, "cache-control": "no-store"})

    return [Route("/metrics", endpoint(metrics, _failure), methods=["GET"])]


def _failure(status: int, message: str, error: LmdError | BodyError | None) -> Response:
    return PlainTextResponse(f"{message}\n", status_code=status)
