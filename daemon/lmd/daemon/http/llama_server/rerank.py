"""`POST /v1/rerank`: how well documents answer a query."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.embedding import Ranking
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import http_caller
from lmd.daemon.http.durations import duration_of
from lmd.daemon.http.llama_server.errors import llama_server_endpoint
from lmd.daemon.http.llama_server.requests import RERANK_PATHS, RerankRequest
from lmd.daemon.http.llama_server.resident import model_of
from lmd.daemon.http.services import Services
from lmd.registry.errors import InvalidRequest


def routes(services: Services) -> list[BaseRoute]:
    """Return the endpoint of ranking, under all its names."""

    async def rerank(request: Request) -> Response:
        body = await read_model(request, RerankRequest)
        documents = body.texts if body.documents is None else body.documents
        if documents is None:
            raise InvalidRequest("`documents` is missing", field="documents")
        model = model_of(body.model, services.residency)
        if body.top_n == 0:
            # As in llama-server: none are wanted. To the application 0 means all.
            return JSONResponse(_answer(body, model, Ranking((), 0, 0, 0), documents))
        ranking = await services.embedding.rerank(
            model=model,
            query=body.query,
            documents=documents,
            top_n=body.top_n or 0,
            truncate=bool(body.truncate),
            keep_alive=duration_of(body.keep_alive, "keep_alive"),
            caller=http_caller(request),
        )
        return JSONResponse(_answer(body, model, ranking, documents))

    handler = llama_server_endpoint(rerank)
    return [Route(path, handler, methods=["POST"]) for path in RERANK_PATHS]


def _answer(body: RerankRequest, model: str, ranking: Ranking, documents: list[str]) -> object:
    """Return Jina's shape, or TEI's for a request that was TEI's; best first in both."""
    if body.documents is None:
        texts = [{"text": documents[ranked.index]} if body.return_text else {} for ranked in ranking.results]
        return [
            {"index": ranked.index, "score": ranked.score, **text}
            for ranked, text in zip(ranking.results, texts, strict=True)
        ]
    return {
        "model": model,
        "object": "list",
        "usage": {"prompt_tokens": ranking.prompt_tokens, "total_tokens": ranking.prompt_tokens},
        "results": [{"index": ranked.index, "relevance_score": ranked.score} for ranked in ranking.results],
    }
