"""`POST /api/embed` and the older `POST /api/embeddings`: texts as vectors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

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
from lmd.daemon.http.ollama.residents import load
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
    keep_alive, inputs, name = keep_alive_of(body.keep_alive), _inputs(body.input), body.model or ""
    if not name:
        raise Refusal(404, "model '' not found")
    with refusing(embed_refusal(name)):
        model = await services.catalog.resolve(name)
        parameters = parameters_of(body.options)
        if not inputs:
            await load(services, model, parameters, keep_alive, caller=caller_of(request))
            return json_response({"model": name, "embeddings": []})
        embedded = await services.embedding.embed(
            model=model,
            inputs=inputs,
            truncate=body.truncate is not False,
            dimensions=body.dimensions or 0,
            parameters=parameters,
            keep_alive=keep_alive,
            caller=http_caller(request),
        )
    vectors = await _written(embedded)
    counts = {
        "total_duration": embedded.total_ns,
        "load_duration": embedded.load_ns,
        "prompt_eval_count": sum(embedded.tokens),
    }
    rest = encoded({key: count for key, count in counts.items() if count})
    start = encoded({"model": name})
    return json_response(start[:-1] + b',"embeddings":[' + b",".join(vectors) + b"]," + rest[1:])


async def _embeddings(services: Services, request: Request) -> Response:
    body = await read_model(request, EmbeddingsBody)
    keep_alive, name = keep_alive_of(body.keep_alive), body.model or ""
    if not name:
        raise Refusal(400, "model is required")
    with refusing(embed_refusal(name)):
        model = await services.catalog.resolve(name)
        parameters = parameters_of(body.options)
        if not body.prompt:
            await load(services, model, parameters, keep_alive, caller=caller_of(request))
            return json_response({"embedding": []})
        # The vector as the model made it, of whatever length, as ever on this route.
        embedded = await services.embedding.embed(
            model=model,
            inputs=[body.prompt],
            truncate=True,
            raw=True,
            parameters=parameters,
            keep_alive=keep_alive,
            caller=http_caller(request),
        )
    (vector,) = await _written(embedded)
    return json_response(b'{"embedding":' + vector + b"}")


def _inputs(value: object) -> list[str]:
    """Return the texts of `input`: one, or several.

    Raises:
        Refusal: it is neither.
    """
    if value is None or value == "":
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "invalid input type")
    return texts


async def _written(embedded: Embeddings) -> list[bytes]:
    """Return vectors as JSON.

    Raises:
        Refusal: JSON has no words for what the model made.
    """
    if sum(map(len, embedded.vectors)) < _MANY:
        return [_json(vector) for vector in embedded.vectors]
    return await asyncio.to_thread(lambda: [_json(vector) for vector in embedded.vectors])


def _json(vector: Sequence[float]) -> bytes:
    if not math.isfinite(sum(vector)):
        raise Refusal(400, "the model gave a vector with NaN or infinity; use another quantization of it")
    # Nine digits are all that numbers of 32 bits have.
    return ("[" + ",".join(map("%.9g".__mod__, vector)) + "]").encode()
