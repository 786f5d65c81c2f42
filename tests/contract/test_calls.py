"""Embeddings, ranks and tokens from end to end below the wire, and the service on top, with fake runners."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from lmd.daemon.embedding import Embedding
from lmd.daemon.errors import DeadlineExceeded, RunnerCrashed, Unloaded
from lmd.daemon.model_calls import Caller, ModelCalls
from lmd.daemon.residency.values import RunnerState
from lmd.daemon.tokenizing import Tokenizing
from lmd.registry.errors import CapabilityMissing, InvalidRequest, ModelNotFound
from lmd.registry.lm_config import Message
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2
from tests.support.inference_bench import Bench, Connection
from tests.support.leaks import until
from tests.support.residents import Model


@pytest.fixture
def calls(bench: Bench) -> ModelCalls:
    return ModelCalls(bench.catalog, bench.world.residency, bench.world.config)


@pytest.fixture
def embedding(calls: ModelCalls) -> Embedding:
    return Embedding(calls)


@pytest.fixture
def tokenizing(calls: ModelCalls) -> Tokenizing:
    return Tokenizing(calls)


def model(bench: Bench, *capabilities: str, **script: Any) -> Model:
    made = replace(bench.model(**script), capabilities=capabilities or ("completion",))
    return bench.catalog.add(made)


async def until_asked(bench: Bench) -> None:
    """Wait until a runner is ready, and so has got what was waiting for it."""
    await until(lambda: any(status.state is RunnerState.READY for status in bench.world.residency.list()))


# Embedding


async def test_texts_become_vectors_in_order(bench: Bench, embedding: Embedding) -> None:
    model(bench)
    found = await embedding.embed(model="m", inputs=["once upon", "a", ""])
    assert [list(vector) for vector in found.vectors] == [[4, 4], [1], []]
    assert list(found.tokens) == [2, 1, 0]
    assert found.total_ns >= found.load_ns > 0
    assert (await embedding.embed(model="m", inputs=["a"])).load_ns == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": ["x"] * 2049}, "inputs"),
        ({"inputs": ["x"], "dimensions": -1}, "dimensions"),
        ({"inputs": ["x"], "parameters": {"num_ctx": -5}}, "num_ctx"),
    ],
)
async def test_embedding_that_makes_no_sense_loads_nothing(
    bench: Bench, embedding: Embedding, options: dict[str, Any], field: str
) -> None:
    model(bench)
    with pytest.raises(InvalidRequest) as caught:
        await embedding.embed(model="m", **options)
    assert caught.value.metadata["field"] == field
    assert bench.world.residency.list() == []


async def test_model_that_lacks_it_is_not_loaded_for_it(bench: Bench, embedding: Embedding) -> None:
    model(bench, "rerank")
    with pytest.raises(CapabilityMissing, match="embedding"):
        await embedding.embed(model="m", inputs=["x"])
    model(bench, "embedding")
    with pytest.raises(CapabilityMissing, match="rerank"):
        await embedding.rerank(model="m", query="x", documents=["y"])
    with pytest.raises(CapabilityMissing, match="completion"):
        await bench.generate("x")
    with pytest.raises(ModelNotFound):
        await embedding.embed(model="other", inputs=["x"])
    assert bench.world.residency.list() == []


async def test_what_the_runner_refuses(bench: Bench, embedding: Embedding) -> None:
    model(bench)
    with pytest.raises(CapabilityMissing, match="embedding"):
        await embedding.embed(model="m", inputs=["fail"])
    assert len((await embedding.embed(model="m", inputs=["x"])).vectors) == 1


async def test_documents_are_ranked_best_first_and_equal_ones_keep_their_order(
    bench: Bench, embedding: Embedding
) -> None:
    model(bench, "rerank")
    documents = ["aa", "a", "aaaa", "bb", "aaa"]
    ranking = await embedding.rerank(model="m", query="q", documents=documents)
    assert [(ranked.index, ranked.score) for ranked in ranking.results] == [(2, 4), (4, 3), (0, 2), (3, 2), (1, 1)]
    assert ranking.prompt_tokens == 5
    best = await embedding.rerank(model="m", query="q", documents=documents, top_n=2)
    assert [ranked.index for ranked in best.results] == [2, 4]
    assert len((await embedding.rerank(model="m", query="q", documents=documents, top_n=99)).results) == 5
    with pytest.raises(InvalidRequest, match="top_n"):
        await embedding.rerank(model="m", query="q", documents=documents, top_n=-1)
    with pytest.raises(InvalidRequest, match="documents"):
        await embedding.rerank(model="m", query="q", documents=[])


# The end of a call


async def test_cancelled_call_is_taken_back(bench: Bench, embedding: Embedding) -> None:
    made = model(bench)
    held = asyncio.create_task(embedding.embed(model="m", inputs=["hold"]))
    await until_asked(bench)
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held
    assert len((await embedding.embed(model="m", inputs=["x"])).vectors) == 1
    # The fake's drain waits for nothing that was taken back.
    assert await bench.world.residency.unload(made.name, force=False) == 0


async def test_call_whose_time_is_up_fails(bench: Bench, embedding: Embedding) -> None:
    model(bench)
    await embedding.embed(model="m", inputs=["x"])
    with pytest.raises(DeadlineExceeded):
        await embedding.embed(model="m", inputs=["hold"], caller=Caller("me", time_left_s=0.05))


async def test_call_whose_time_is_up_while_the_model_loads_fails(
    bench: Bench, embedding: Embedding, tmp_path: Path
) -> None:
    model(bench, gate=str(tmp_path / "gate"))
    with pytest.raises(DeadlineExceeded):
        await embedding.embed(model="m", inputs=["x"], caller=Caller("me", time_left_s=0.05))
    (tmp_path / "gate").touch()


async def test_calls_end_with_their_runner(bench: Bench, embedding: Embedding) -> None:
    model(bench)
    held = asyncio.create_task(embedding.embed(model="m", inputs=["hold"]))
    await until_asked(bench)
    with pytest.raises(RunnerCrashed):
        await bench.generate("abort")
    with pytest.raises(RunnerCrashed):
        await held


async def test_calls_end_with_a_forced_unload(bench: Bench, embedding: Embedding) -> None:
    made = model(bench)
    held = asyncio.create_task(embedding.embed(model="m", inputs=["hold"]))
    await until_asked(bench)
    await bench.world.residency.unload(made.name, force=True)
    with pytest.raises(Unloaded):
        await held


# Tokens


async def test_tokens_there_and_back(bench: Bench, tokenizing: Tokenizing) -> None:
    model(bench)
    tokens = await tokenizing.tokenize(model="m", text="once upon a")
    assert (list(tokens.ids), list(tokens.pieces)) == ([4, 4, 1], [b"once", b"upon", b"a"])
    assert await tokenizing.detokenize(model="m", tokens=[2, 1]) == "xx x"
    with pytest.raises(InvalidRequest, match="text"):
        await tokenizing.tokenize(model="m", text="x" * ((1 << 20) + 1))
    with pytest.raises(InvalidRequest, match="tokens"):
        await tokenizing.detokenize(model="m", tokens=[1] * ((1 << 20) + 1))


async def test_template_gets_what_a_chat_would(bench: Bench, tokenizing: Tokenizing) -> None:
    made = model(bench, "completion", "chat")
    bench.catalog.add(replace(made, system="terse", messages=(Message("user", "1"), Message("assistant", "2"))))
    prompt = await tokenizing.apply_template(model="m", messages=[Message("user", "hi")])
    assert prompt.text == "system=terse\nuser=1\nassistant=2\nuser=hi\n"
    assert b" ".join(prompt.tokens.pieces).decode() == "system=terse user=1 assistant=2 user=hi"
    own = await tokenizing.apply_template(model="m", messages=[Message("system", "long"), Message("user", "hi")])
    assert own.text.startswith("system=long\n")
    with pytest.raises(InvalidRequest, match="robot"):
        await tokenizing.apply_template(model="m", messages=[Message("robot", "hi")])
    model(bench)
    with pytest.raises(CapabilityMissing, match="chat"):
        await tokenizing.apply_template(model="m", messages=[Message("user", "hi")])


# Over the wire


async def test_calls_over_the_wire(bench: Bench, connection: Connection) -> None:
    made = model(bench, "completion", "chat")
    request = pb.EmbedRequest(model="m", inputs=["once upon", "a"])
    request.keep_alive.FromTimedelta(timedelta(seconds=-1))
    embedded = await connection.inference.Embed(request)
    assert [(list(e.values), e.prompt_tokens) for e in embedded.embeddings] == [([4, 4], 2), ([1], 1)]
    assert embedded.prompt_tokens == 3
    assert embedded.total_duration.ToNanoseconds() >= embedded.load_duration.ToNanoseconds() > 0
    status = bench.world.status(made)
    assert status is not None
    assert status.keep_forever
    tokenized = await connection.inference.Tokenize(pb.TokenizeRequest(model="m", text="once upon"))
    assert [(token.id, token.piece) for token in tokenized.tokens] == [(4, b"once"), (4, b"upon")]
    assert (await connection.inference.Detokenize(pb.DetokenizeRequest(model="m", tokens=[3]))).text == "xxx"
    turn = model_pb2.Message(role="user", content="hi")
    applied = await connection.inference.ApplyTemplate(pb.ApplyTemplateRequest(model="m", messages=[turn]))
    assert (applied.prompt, [token.piece for token in applied.tokens]) == ("user=hi\n", [b"user=hi"])
    model(bench, "rerank")
    ranked = await connection.inference.Rerank(pb.RerankRequest(model="m", query="q", documents=["a", "aaa"], top_n=1))
    assert [(result.index, result.score) for result in ranked.results] == [(1, 3)]
    assert ranked.prompt_tokens == 2


async def test_large_replies_over_the_wire(bench: Bench, connection: Connection) -> None:
    """They are put together in a thread."""
    model(bench)
    text = "word " * 60_000
    embedded = await connection.inference.Embed(pb.EmbedRequest(model="m", inputs=[text]))
    assert list(embedded.embeddings[0].values) == [4.0] * 60_000
    assert len((await connection.inference.Tokenize(pb.TokenizeRequest(model="m", text=text))).tokens) == 60_000


async def test_errors_over_the_wire(bench: Bench, connection: Connection) -> None:
    model(bench)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await connection.inference.Embed(pb.EmbedRequest(model="m"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await connection.inference.Rerank(pb.RerankRequest(model="m", query="x", documents=["x"]))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
