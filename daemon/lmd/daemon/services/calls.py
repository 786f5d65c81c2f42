"""The calls of InferenceService that have one reply; the behaviour is in `lmd.daemon.embedding` and `tokenizing`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

import grpc.aio

from lmd.daemon.callers import HasPeer
from lmd.daemon.embedding import Embedding, Embeddings
from lmd.daemon.inference import Inference
from lmd.daemon.model_calls import Caller
from lmd.daemon.services.answers import duration, think_of, tools_of, turns_of
from lmd.daemon.services.inference import InferenceServiceServicer, cache_scope_of, keep_alive_of, requested
from lmd.daemon.tokenizing import Tokenizing, Tokens
from lmd.v1 import inference_service_pb2 as pb

T = TypeVar("T")

#: Numbers or tokens of a reply above which it is put together in a thread, so that nobody else's call waits for that.
_MANY = 50_000


class _Context(HasPeer, Protocol):
    """What is needed of a call's context."""

    def time_remaining(self) -> float | None:
        """Return the seconds until the client's deadline."""


class InferenceCallsServicer(InferenceServiceServicer):
    """The whole service: the answers, and the calls that have one reply."""

    def __init__(self, inference: Inference, embedding: Embedding, tokenizing: Tokenizing) -> None:
        super().__init__(inference)
        self._embedding = embedding
        self._tokenizing = tokenizing

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext[pb.EmbedRequest, pb.EmbedResponse]
    ) -> pb.EmbedResponse:
        """Turn texts into vectors."""
        embeddings = await self._embedding.embed(
            model=request.model,
            inputs=request.inputs,
            truncate=request.truncate,
            dimensions=request.dimensions,
            raw=request.raw,
            parameters=requested(request.parameters),
            keep_alive=keep_alive_of(request),
            caller=_caller(context),
        )
        return await _made(sum(map(len, embeddings.vectors)), lambda: _embed_response(embeddings))

    async def Rerank(
        self, request: pb.RerankRequest, context: grpc.aio.ServicerContext[pb.RerankRequest, pb.RerankResponse]
    ) -> pb.RerankResponse:
        """Rank documents."""
        ranking = await self._embedding.rerank(
            model=request.model,
            query=request.query,
            documents=request.documents,
            top_n=request.top_n,
            truncate=request.truncate,
            parameters=requested(request.parameters),
            keep_alive=keep_alive_of(request),
            caller=_caller(context),
        )
        return pb.RerankResponse(
            results=[pb.RankedDocument(index=ranked.index, score=ranked.score) for ranked in ranking.results],
            prompt_tokens=ranking.prompt_tokens,
            total_duration=duration(ranking.total_ns),
            load_duration=duration(ranking.load_ns),
        )

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext[pb.TokenizeRequest, pb.TokenizeResponse]
    ) -> pb.TokenizeResponse:
        """Return the tokens of a text."""
        tokens = await self._tokenizing.tokenize(
            model=request.model,
            text=request.text,
            add_special=request.add_special,
            plain=request.plain,
            keep_alive=keep_alive_of(request),
            caller=_caller(context),
        )
        return await _made(len(tokens.ids), lambda: pb.TokenizeResponse(tokens=_tokens(tokens)))

    async def Detokenize(
        self,
        request: pb.DetokenizeRequest,
        context: grpc.aio.ServicerContext[pb.DetokenizeRequest, pb.DetokenizeResponse],
    ) -> pb.DetokenizeResponse:
        """Return the text of tokens."""
        text = await self._tokenizing.detokenize(
            model=request.model, tokens=request.tokens, keep_alive=keep_alive_of(request), caller=_caller(context)
        )
        return pb.DetokenizeResponse(text=text)

    async def ApplyTemplate(
        self,
        request: pb.ApplyTemplateRequest,
        context: grpc.aio.ServicerContext[pb.ApplyTemplateRequest, pb.ApplyTemplateResponse],
    ) -> pb.ApplyTemplateResponse:
        """Return the prompt that a chat would be."""
        prompt = await self._tokenizing.apply_template(
            model=request.model,
            messages=turns_of(request.messages),
            tools=tools_of(request),
            think=think_of(request),
            keep_alive=keep_alive_of(request),
            caller=_caller(context),
        )
        return await _made(
            len(prompt.tokens.ids),
            lambda: pb.ApplyTemplateResponse(prompt=prompt.text, tokens=_tokens(prompt.tokens)),
        )


def _caller(context: _Context) -> Caller:
    return Caller(cache_scope_of(context), context.time_remaining())


async def _made(size: int, make: Callable[[], T]) -> T:
    return make() if size < _MANY else await asyncio.to_thread(make)


def _embed_response(embeddings: Embeddings) -> pb.EmbedResponse:
    return pb.EmbedResponse(
        embeddings=[
            pb.Embedding(values=values, prompt_tokens=tokens)
            for values, tokens in zip(embeddings.vectors, embeddings.tokens, strict=True)
        ],
        prompt_tokens=sum(embeddings.tokens),
        total_duration=duration(embeddings.total_ns),
        load_duration=duration(embeddings.load_ns),
    )


def _tokens(tokens: Tokens) -> list[pb.Token]:
    return [pb.Token(id=token, piece=piece) for token, piece in zip(tokens.ids, tokens.pieces, strict=True)]
