"""`POST /v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from array import array
from collections.abc import Sequence
from typing import cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.embedding import Embeddings
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import http_caller
from lmd.daemon.http.openai import options
from lmd.daemon.http.openai.errors import openai_endpoint
from lmd.daemon.http.openai.requests import EmbeddingRequest
from lmd.daemon.http.services import Services
from lmd.registry.errors import InvalidRequest

#: Numbers above which an answer is written in a thread, so that nobody else waits for that.
_MANY = 20_000


def routes(services: Services) -> list[BaseRoute]:
    """Return the endpoint of embeddings."""

    async def embed(request: Request) -> Response:
        body = await read_model(request, EmbeddingRequest)
        embeddings = await services.embedding.embed(
            model=body.model,
            inputs=_inputs(body),
            truncate=bool(body.truncate),
            dimensions=body.dimensions or 0,
            parameters=options.parameters_of(body),
            keep_alive=options.keep_alive_of(body),
            caller=http_caller(request),
        )
        as_base64 = body.encoding_format == "base64"
        if sum(map(len, embeddings.vectors)) < _MANY:
            written = _answer(embeddings, body.model, as_base64)
        else:
            written = await asyncio.to_thread(_answer, embeddings, body.model, as_base64)
        return Response(written, media_type="application/json")

    return [Route("/v1/embeddings", openai_endpoint(embed), methods=["POST"])]


def _inputs(body: EmbeddingRequest) -> Sequence[str]:
    given = body.input
    texts = [given] if isinstance(given, str) else given
    if not texts:
        raise InvalidRequest("`input` is empty", field="input")
    if not isinstance(texts[0], str):
        raise InvalidRequest(
            "`input` must be text: tokens made by another tokenizer mean nothing to this model",
            field="input",
            hint="send the text itself; in LangChain, set check_embedding_ctx_length=False",
        )
    if "" in texts:
        raise InvalidRequest("`input` has an empty text", field="input")
    return cast(Sequence[str], texts)


def _answer(embeddings: Embeddings, model: str, as_base64: bool) -> bytes:
    tokens = sum(embeddings.tokens)
    return json.dumps(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _base64(vector) if as_base64 else list(vector)}
                for index, vector in enumerate(embeddings.vectors)
            ],
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        },
        ensure_ascii=False,
        allow_nan=False,
    ).encode()


def _base64(vector: Sequence[float]) -> str:
    """Return 32-bit floats, little end first, as base64."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
