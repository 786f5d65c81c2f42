"""`GET /metrics`: what the daemon counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.http.adapters import render_plain
from lmd.daemon.http.endpoint import endpoint
from lmd.daemon.http.services import Services


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the route."""

    async def metrics(request: Request) -> Response:
        scrape = services.metrics.scrape()
        accept = request.headers.get("accept", "")
        # A few milliseconds of text, which no answer has to wait for.
        body, media_type = await services.pool.run(scrape.render, accept)
        return Response(body, headers={"content-type": media_type, "cache-control": "no-store"})

    return [Route("/metrics", endpoint(metrics, render_plain), methods=["GET"])]
