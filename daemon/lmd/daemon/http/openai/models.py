"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.http.openai.errors import openai_endpoint
from lmd.daemon.http.services import Services
from lmd.daemon.summaries import ListedModel

#: Who owns models whose name has no namespace, as Ollama says it.
_NOBODY = "library"


def routes(services: Services) -> list[BaseRoute]:
    """Return the endpoints of models."""
    catalog = services.catalog

    async def list_models(_: Request) -> Response:
        models: list[ListedModel] = []
        token = ""
        while True:
            page = await catalog.list(page_token=token)
            models += page.models
            token = page.next_token
            if not token:
                return JSONResponse({"object": "list", "data": [_model(model) for model in models]})

    async def get_model(request: Request) -> Response:
        tag = await catalog.find(request.path_params["id"])
        return JSONResponse(_model(await catalog.describe(tag)))

    return [
        Route("/v1/models", openai_endpoint(list_models), methods=["GET"]),
        Route("/v1/models/{id:path}", openai_endpoint(get_model), methods=["GET"]),
    ]


def _model(model: ListedModel) -> dict[str, object]:
    """Return a model as OpenAI lists it; *meta* is what llama-server adds."""
    tag, summary = model.tag, model.summary
    namespace, slash, _ = tag.name.rpartition("/")
    return {
        "id": tag.name,
        "object": "model",
        "created": int(tag.modified_at),
        "owned_by": namespace if slash else _NOBODY,
        "meta": {
            "n_vocab": summary.vocabulary_size,
            "n_ctx_train": summary.context_length,
            "n_embd": summary.embedding_length,
            "n_params": summary.parameter_count,
            "size": summary.size_bytes,
        },
    }
