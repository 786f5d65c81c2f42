"""`POST /api/embed` and the older `POST /api/embeddings`: texts as vectors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from datetime import timedelta

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from lmd.daemon.embedding import Embeddings
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import caller_of, http_caller
from lmd.daemon.http.ollama.failures import Refusal, embed_refusal, refusing
from lmd.daemon.http.ollama.options import parameters_of
from lmd.daemon.http.ollama.replies import encoded, json_response
from lmd.daemon.http.ollama.requests import EmbedBody, EmbeddingsBody
from lmd.daemon.http.ollama.residents import load, unload
from lmd.daemon.http.ollama.route import post
from lmd.daemon.http.ollama.wishes import keep_alive_of
from lmd.daemon.http.services import Services

#: Numbers of a reply above which it is written in a thread, so that nobody else's answer waits for that.
_MANY = 50_000


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the routes."""

    async def embed(request: Request) -> Response:
        return await _embed(services, request)

    async def embeddings(request: Request) -> Response:
        return await _embeddings(services, request)

    return [post("/api/embed", embed), post("/api/embeddings", embeddings)]


async def _embed(services: Services, request: Request) -> Response:
    body = await read_model(request, EmbedBody)
    keep_alive, name = keep_alive_of(body.keep_alive), body.model or ""
    inputs = _inputs(body.input)
    if not name:
        raise Refusal(404, "model '' not found")
    with refusing(embed_refusal(name)):
        model = await services.catalog.resolve(name)
        parameters = parameters_of(body.options)
        if (body.dimensions or 0) < 0:
            raise Refusal(400, "dimensions cannot be negative")
        if not inputs:
            await _load_or_unload(services, request, name, parameters, keep_alive)
            return json_response({"model": name, "embeddings": []})
        embedded = await services.embedding.embed(
            model=name,
            inputs=inputs,
            truncate=body.truncate is not False,
            dimensions=body.dimensions or 0,
            parameters=parameters,
            keep_alive=keep_alive,
            caller=http_caller(request),
        )
        del model
    vectors = await _written(embedded)
    counts = {
        "total_duration": embedded.total_ns,
        "load_duration": embedded.load_ns,
        "prompt_eval_count": sum(embedded.tokens),
    }
    more = encoded({"model": name, **{key: count for key, count in counts.items() if count}})
    return json_response(more[:-1] + b',"embeddings":[' + b",".join(vectors) + b"]}")


async def _embeddings(services: Services, request: Request) -> Response:
    body = await read_model(request, EmbeddingsBody)
    keep_alive, name = keep_alive_of(body.keep_alive), body.model or ""
    if not name:
        raise Refusal(400, "model is required")
    with refusing(embed_refusal(name)):
        await services.catalog.resolve(name)
        parameters = parameters_of(body.options)
        if not body.prompt:
            await _load_or_unload(services, request, name, parameters, keep_alive)
            return json_response({"embedding": []})
        embedded = await services.embedding.embed(
            model=name,
            inputs=[body.prompt],
            truncate=True,
            raw=True,
            parameters=parameters,
            keep_alive=keep_alive,
            caller=http_caller(request),
        )
    (vector,) = await _written(embedded)
    return json_response(b'{"embedding":' + vector + b"}")
