"""What clients of llama-server send. All of it takes `model`, which may be left out while one model is resident."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from lmd.daemon.http.openai.requests import Body, ChatMessage, ChatTool, TemplateArguments


class ModelBody(Body):
    """What all of these have."""

    model: str | None = None
    keep_alive: float | str | None = None


class RerankRequest(ModelBody):
    """`POST /v1/rerank`: documents as Jina's API has them, or *texts* as TEI's."""

    query: str
    documents: list[str] | None = None
    texts: list[str] | None = None
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_text: bool | None = None
    truncate: bool | None = None


class TokenizeRequest(ModelBody):
    """`POST /tokenize`."""

    content: str
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(ModelBody):
    """`POST /detokenize`."""

    tokens: list[int]


class ApplyTemplateRequest(ModelBody):
    """`POST /apply-template`."""

    messages: list[ChatMessage]
    tools: list[ChatTool] | None = None
    chat_template_kwargs: TemplateArguments | None = None


RERANK_PATHS = ("/v1/rerank", "/rerank", "/v1/reranking", "/reranking")

REQUESTS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(RERANK_PATHS, RerankRequest),
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/apply-template": ApplyTemplateRequest,
}
"""The body of each endpoint."""
