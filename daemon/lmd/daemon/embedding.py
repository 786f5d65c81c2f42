"""Turns texts into vectors, and ranks documents: what every adapter offers, in terms of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from lmd.daemon.errors import ContextLengthExceeded
from lmd.daemon.inference import AnswerableModel
from lmd.daemon.model_calls import Caller, ModelCalls, Reply
from lmd.registry.errors import CapabilityMissing, InvalidRequest
from lmd.registry.parameters import INT32_MAX
from lmd.runner.v1 import frames_pb2 as frames

MAX_INPUTS = 2048

_EVERYONE = Caller()


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A vector for each text, in order, and the tokens of each."""

    vectors: Sequence[Sequence[float]]
    tokens: Sequence[int]
    total_ns: int
    load_ns: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document's place in the request, and its score."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents, best first; *prompt_tokens* are those of the query with each document, together."""

    results: Sequence[Ranked]
    prompt_tokens: int
    total_ns: int
    load_ns: int


class Embedding:
    """Embeds and ranks. Cancelling a call stops the work."""

    def __init__(self, calls: ModelCalls) -> None:
        self._calls = calls

    async def embed(
        self,
        *,
        model: str | AnswerableModel,
        inputs: Sequence[str],
        truncate: bool = False,
        dimensions: int = 0,
        raw: bool = False,
        parameters: Mapping[str, object] | None = None,
        keep_alive: timedelta | None = None,
        caller: Caller = _EVERYONE,
    ) -> Embeddings:
        """Return the vectors of texts. Every model can do it but those that rank.

        *truncate* cuts texts that are too long; *dimensions* keeps so many numbers of each vector, 0 all; with *raw*
        vectors keep the length that the model gave them, which otherwise is made 1.

        Raises:
            CapabilityMissing: the model ranks.
            ContextLengthExceeded: a text is too long.
            LmdError: as `ModelCalls.call`.
        """
        _check_count(inputs, "inputs")
        if not 0 <= dimensions <= INT32_MAX:
            raise InvalidRequest("`dimensions` cannot be negative", field="dimensions")

        def build(resolved: AnswerableModel) -> frames.DaemonFrame:
            if "rerank" in resolved.capabilities:
                hint = "it ranks documents: use `lm rerank`, or another model"
                raise CapabilityMissing(resolved.name, "embedding", hint=hint)
            return frames.DaemonFrame(
                embed=frames.Embed(inputs=inputs, truncate=truncate, dimensions=dimensions, raw=raw, caller=caller.name)
            )

        try:
            reply = await self._calls.call(model, build, caller=caller, parameters=parameters, keep_alive=keep_alive)
        except ContextLengthExceeded as error:
            raise error.of("a text") from None
        embedded = reply.frame.embedded
        return Embeddings(
            vectors=[vector.values for vector in embedded.vectors],
            tokens=embedded.tokens,
            total_ns=reply.total_ns,
            load_ns=reply.load_ns,
        )

    async def rerank(
        self,
        *,
        model: str | AnswerableModel,
        query: str,
        documents: Sequence[str],
        top_n: int = 0,
        truncate: bool = False,
        parameters: Mapping[str, object] | None = None,
        keep_alive: timedelta | None = None,
        caller: Caller = _EVERYONE,
    ) -> Ranking:
        """Score how well documents answer a query; return the best *top_n*, 0 for all. Equal ones keep their order.

        Raises:
            CapabilityMissing: the model does not rank.
            ContextLengthExceeded: the query with a document is too long.
            LmdError: as `ModelCalls.call`.
        """
        _check_count(documents, "documents")
        if top_n < 0:
            raise InvalidRequest("`top_n` cannot be negative", field="top_n")

        def build(resolved: AnswerableModel) -> frames.DaemonFrame:
            if "rerank" not in resolved.capabilities:
                hint = "use a model made for ranking; `lm show` lists what each can do"
                raise CapabilityMissing(resolved.name, "rerank", hint=hint)
            return frames.DaemonFrame(
                embed=frames.Embed(inputs=documents, query=query, truncate=truncate, caller=caller.name)
            )

        try:
            reply = await self._calls.call(model, build, caller=caller, parameters=parameters, keep_alive=keep_alive)
        except ContextLengthExceeded as error:
            raise error.of("the query with a document") from None
        return _ranking(reply, top_n or len(documents))


def _ranking(reply: Reply, top_n: int) -> Ranking:
    embedded = reply.frame.embedded
    ranked = [Ranked(index, vector.values[0]) for index, vector in enumerate(embedded.vectors)]
    ranked.sort(key=lambda one: -one.score)
    return Ranking(ranked[:top_n], sum(embedded.tokens), reply.total_ns, reply.load_ns)


def _check_count(texts: Sequence[str], field: str) -> None:
    if not 1 <= len(texts) <= MAX_INPUTS:
        raise InvalidRequest(f"`{field}` takes 1 to {MAX_INPUTS} texts, not {len(texts)}", field=field)
