"""Embeddings and ranks from a real runner process, checked against the engine itself and against numpy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import RunnerProcess
from tests.support.tiny_models import (
    CHATML,
    make_tiny_bert,
    make_tiny_gemma,
    make_tiny_llama,
    make_tiny_mamba,
    wordpieces,
)

Failed = frames_pb2.Failed
Embed = frames_pb2.Embed
Pooling = gguf.PoolingType
Vector = npt.NDArray[np.float64]

TEXTS = (
    "the people went to the house",
    "water",
    "",
    "and they saw that the water was great but the house of the people was small",
    "the people went home",
)
LONG = "the house of the people was small and the water was great but they all went home " * 8
# The engine looks its GELU up in a table of 16-bit numbers: sums in another order may end at the next entry.
BERT_ROUNDING = 1e-4
RERANK = "<|im_start|>q {query} d {document}<|im_end|>"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for pooling in (Pooling.MEAN, Pooling.CLS, Pooling.LAST):
        make_tiny_bert(directory / f"bert-{pooling.name}.gguf", pooling=pooling)
        make_tiny_llama(directory / f"llama-{pooling.name}.gguf", pooling=pooling, n_ctx=1024)
    make_tiny_bert(directory / "bert-unsaid.gguf", pooling=None)
    make_tiny_bert(directory / "bert-none.gguf", pooling=Pooling.NONE)
    make_tiny_bert(directory / "rank.gguf", pooling=Pooling.RANK, classifier=True)
    make_tiny_llama(directory / "whole.gguf", pooling=Pooling.MEAN, causal=False, n_ctx=1024)
    make_tiny_llama(directory / "plain.gguf", n_ctx=1024, chat_template=CHATML)
    make_tiny_llama(directory / "no-start.gguf", add_bos=False, pooling=Pooling.LAST)
    make_tiny_gemma(directory / "gemma.gguf", n_ctx=1024)
    make_tiny_mamba(directory / "mamba.gguf", n_ctx=1024)
    return directory


@pytest.fixture
def runner() -> Iterator[RunnerProcess]:
    with RunnerProcess() as process:
        yield process


@pytest.fixture(scope="module")
def bert(models: Path) -> Iterator[RunnerProcess]:
    """A runner with an encoder, shared by tests that leave nothing behind."""
    with RunnerProcess() as process:
        process.load(models / "bert-MEAN.gguf")
        yield process


@pytest.fixture(scope="module")
def rank(models: Path) -> Iterator[RunnerProcess]:
    """A runner with a reranker."""
    with RunnerProcess() as process:
        process.load(models / "rank.gguf")
        yield process


@pytest.fixture(scope="module")
def plain(models: Path) -> Iterator[RunnerProcess]:
    """A runner with a model that generates and embeds."""
    with RunnerProcess() as process:
        process.load(models / "plain.gguf", num_ctx=1024)
        yield process


def arrays(embedded: frames_pb2.Embedded) -> list[Vector]:
    return [np.array(vector.values) for vector in embedded.vectors]


def failed(reply: frames_pb2.RunnerFrame) -> frames_pb2.Failed:
    assert reply.HasField("failed"), str(reply)
    return reply.failed


# What is loaded


@pytest.mark.parametrize(
    ("file", "generates", "pooling"),
    [
        ("bert-MEAN", False, "mean"),
        ("bert-CLS", False, "cls"),
        ("llama-LAST", False, "last"),
        ("rank", False, "rank"),
        ("bert-unsaid", False, "mean"),
        ("bert-none", False, "mean"),
        ("plain", True, "mean"),
    ],
)
def test_ready_says_what_the_model_is_for(
    runner: RunnerProcess, models: Path, file: str, generates: bool, pooling: str
) -> None:
    ready = runner.load(models / f"{file}.gguf")
    assert (ready.generates, ready.pooling, ready.embedding_length) == (generates, pooling, 64)
    assert ready.weights_bytes > 0
    assert ready.compute_bytes > 0
    # An encoder has no memory of what it read.
    assert (ready.kv_bytes > 0) is ("llama" in file or generates)


# The numbers


def _norm(x: Vector, weight: Vector, bias: Vector) -> Vector:
    centred = x - x.mean(-1, keepdims=True)
    normed: Vector = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * weight + bias
    return normed


def bert_states(path: Path, tokens: list[int]) -> Vector:
    """Return what BERT makes of tokens, written anew after its paper: one row for each token."""
    weights = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in gguf.GGUFReader(path).tensors}

    def dense(x: Vector, name: str) -> Vector:
        result: Vector = x @ weights[name + ".weight"].T + weights[name + ".bias"]
        return result

    def norm(x: Vector, name: str) -> Vector:
        return _norm(x, weights[name + ".weight"], weights[name + ".bias"])

    count, heads, width = len(tokens), 4, 16
    x = (
        weights["token_embd.weight"][tokens]
        + weights["token_types.weight"][0]
        + weights["position_embd.weight"][:count]
    )
    x = norm(x, "token_embd_norm")
    for layer in range(2):
        prefix = f"blk.{layer}."
        q, k, v = (dense(x, f"{prefix}attn_{name}").reshape(count, heads, width) for name in "qkv")
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(width)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), v).reshape(count, heads * width)
        x = norm(dense(mixed, prefix + "attn_output") + x, prefix + "attn_output_norm")
        up = dense(x, prefix + "ffn_up")
        gelu = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = norm(dense(gelu, prefix + "ffn_down") + x, prefix + "layer_output_norm")
    return x


def bert_tokens(text: str) -> list[int]:
    pieces = wordpieces()
    return [2, *(pieces.index("▁" + word) for word in text.split()), 3]


@pytest.mark.parametrize("pooling", ["MEAN", "CLS", "LAST"])
def test_encoder_gives_the_numbers_of_the_paper(runner: RunnerProcess, models: Path, pooling: str) -> None:
    path = models / f"bert-{pooling}.gguf"
    runner.load(path)
    embedded = runner.embed(*TEXTS, raw=True)
    for text, vector in zip(TEXTS, arrays(embedded), strict=True):
        states = bert_states(path, bert_tokens(text))
        expected = {"MEAN": states.mean(0), "CLS": states[0], "LAST": states[-1]}[pooling]
        np.testing.assert_allclose(vector, expected, atol=2e-2, rtol=1e-2)
    assert list(embedded.tokens) == [len(bert_tokens(text)) for text in TEXTS]


def test_reranker_gives_the_numbers_of_the_paper(rank: RunnerProcess, models: Path) -> None:
    query, documents = "water house", ["the water was great", "they went home"]
    scores = [vector.values[0] for vector in rank.embed(*documents, query=query).vectors]
    weights = {t.name: np.array(t.data, dtype=np.float64) for t in gguf.GGUFReader(models / "rank.gguf").tensors}
    for document, score in zip(documents, scores, strict=True):
        tokens = [*bert_tokens(query), *bert_tokens(document)[1:-1]]
        first = bert_states(models / "rank.gguf", tokens)[0]
        hidden = np.tanh(weights["cls.weight"] @ first + weights["cls.bias"])
        expected = (weights["cls.output.weight"] @ hidden + weights["cls.output.bias"]).item()
        assert score == pytest.approx(expected, abs=2e-2)


def engine_vector(path: Path, text: str, pooling: Pooling) -> Vector:
    """Return the engine's own vector for a text, through the high-level API and in another process."""
    program = (
        "import sys, json, llama_cpp\n"
        "path, text, pooling = sys.argv[1:]\n"
        "llama = llama_cpp.Llama(path, embedding=True, pooling_type=int(pooling), n_ctx=1024, n_batch=1024,"
        " n_ubatch=1024, n_threads=1, verbose=False)\n"
        "print(json.dumps(llama.embed(text, normalize=False)))\n"
    )
    command = [sys.executable, "-c", program, str(path), text, str(int(pooling))]
    return np.array(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


@pytest.mark.parametrize("pooling", ["MEAN", "CLS", "LAST"])
def test_decoder_gives_the_engines_numbers_also_in_pieces(runner: RunnerProcess, models: Path, pooling: str) -> None:
    """A text of more than a batch is decoded in pieces, whose vectors are put together."""
    path = models / f"llama-{pooling}.gguf"
    runner.load(path, num_ctx=1024)
    text = LONG * 6
    embedded = runner.embed(text, "water", raw=True)
    assert embedded.tokens[0] > 512
    for vector, words in zip(arrays(embedded), (text, "water"), strict=True):
        expected = engine_vector(path, words, getattr(Pooling, pooling))
        np.testing.assert_allclose(vector, expected, atol=2e-3, rtol=2e-3)


def test_text_without_causal_attention_is_read_whole(runner: RunnerProcess, models: Path) -> None:
    """The engine would abort if it got such a text in pieces, and the first token would not see the last."""
    runner.load(models / "whole.gguf", num_ctx=1024)
    long = LONG * 6
    first, other = arrays(runner.embed(long, long + " water", raw=True))
    np.testing.assert_allclose(first, engine_vector(models / "whole.gguf", long, Pooling.MEAN), atol=2e-3, rtol=2e-3)
    assert not np.allclose(first, other)


# Batches


@pytest.mark.parametrize(
    "file", ["bert-MEAN", "bert-CLS", "llama-MEAN", "llama-LAST", "whole", "plain", "gemma", "mamba"]
)
def test_text_has_the_same_vector_alone_and_in_a_batch(runner: RunnerProcess, models: Path, file: str) -> None:
    runner.load(models / f"{file}.gguf", num_ctx=1024)
    tolerance = BERT_ROUNDING if "bert" in file else 1e-5
    together = arrays(runner.embed(*TEXTS))
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(arrays(runner.embed(text))[0], vector, atol=tolerance)
    assert len({tuple(vector) for vector in together}) == len(TEXTS)


def test_many_texts_come_back_in_order(bert: RunnerProcess) -> None:
    words = [f"{first} {second}" for first in TEXTS[0].split() for second in TEXTS[3].split()]
    texts = [words[number % len(words)] for number in range(2048)]
    embedded = bert.embed(*texts)
    vectors = arrays(embedded)
    assert len(vectors) == len(embedded.tokens) == 2048
    alone = {word: arrays(bert.embed(word))[0] for word in set(words)}
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(vector, alone[text], atol=BERT_ROUNDING)


def test_two_hundred_requests_at_once(bert: RunnerProcess) -> None:
    alone = [arrays(bert.embed(text))[0] for text in TEXTS]
    with bert.paused():
        calls = [
            bert.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=[TEXTS[n % len(TEXTS)]], caller=f"{n % 7}")))
            for n in range(200)
        ]
    for n, call in enumerate(calls):
        (vector,) = arrays(bert.reply(call).embedded)
        np.testing.assert_allclose(vector, alone[n % len(TEXTS)], atol=BERT_ROUNDING)


def test_callers_take_turns(bert: RunnerProcess) -> None:
    with bert.paused():
        many = bert.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=TEXTS * 200, caller="greedy")))
        more = bert.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=TEXTS * 200, caller="greedy")))
        one = bert.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=["water"], caller="modest")))
    bert.reply(more)
    assert [ended for ended in bert.ended if ended in (many, more, one)] == [one, many, more]


def test_answers_go_on_while_texts_are_embedded(plain: RunnerProcess) -> None:
    answer = plain.submit("the people", num_predict=300)
    texts = plain.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=TEXTS * 400)))
    plain.reply(texts)
    plain.answer(answer)
    assert plain.answers[answer].done.generated_tokens == 300
    assert plain.ask("the people", num_predict=300).text == plain.answers[answer].text


# What the request says


def test_vectors_have_length_one_unless_raw(bert: RunnerProcess) -> None:
    raw, unit = (arrays(bert.embed(*TEXTS, raw=raw)) for raw in (True, False))
    for vector, scaled in zip(raw, unit, strict=True):
        assert np.linalg.norm(scaled) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(vector / np.linalg.norm(vector), scaled, atol=1e-6)
    assert any(abs(np.linalg.norm(vector) - 1) > 0.1 for vector in raw)


def test_dimensions_are_cut_before_the_length_is_made_one(bert: RunnerProcess) -> None:
    whole = arrays(bert.embed("water", raw=True))[0]
    cut = arrays(bert.embed("water", dimensions=16))[0]
    np.testing.assert_allclose(cut, whole[:16] / np.linalg.norm(whole[:16]), atol=1e-6)
    assert len(arrays(bert.embed("water", dimensions=64))[0]) == 64


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": ["water"], "dimensions": 65}, "dimensions"),
        ({"inputs": ["water"], "dimensions": -1}, "dimensions"),
        ({"inputs": ["a"] * 300_000}, "inputs"),
    ],
)
def test_request_that_makes_no_sense_fails(bert: RunnerProcess, options: dict[str, Any], field: str) -> None:
    failure = failed(bert.call(embed=Embed(**options)))
    assert (failure.kind, failure.field) == (Failed.KIND_INVALID, field)


@pytest.mark.parametrize("words", [127, 40_000])
def test_text_that_is_too_long_fails_with_both_numbers(bert: RunnerProcess, words: int) -> None:
    failure = failed(bert.call(embed=Embed(inputs=["water", "water " * words])))
    assert failure.kind == Failed.KIND_CONTEXT_LENGTH
    assert (failure.prompt_tokens, failure.context_tokens) == (words + 2, 128)
    assert bert.embed("water " * 126).tokens[0] == 128


def test_text_is_cut_to_fit_and_keeps_its_end_token(bert: RunnerProcess) -> None:
    cut = bert.embed("water " * 126 + "house " * 500, truncate=True)
    assert list(cut.tokens) == [128]
    np.testing.assert_allclose(arrays(cut)[0], arrays(bert.embed("water " * 126))[0], atol=BERT_ROUNDING)


def test_document_is_cut_to_fit_and_the_query_is_not(rank: RunnerProcess) -> None:
    cut = rank.embed("water " * 500, "they", query="house home", truncate=True)
    assert list(cut.tokens) == [128, 5]
    failure = failed(rank.call(embed=Embed(inputs=["they"], query="house " * 200, truncate=True)))
    assert (failure.kind, failure.context_tokens) == (Failed.KIND_CONTEXT_LENGTH, 128)
    failure = failed(rank.call(embed=Embed(inputs=["water " * 500], query="house")))
    assert failure.kind == Failed.KIND_CONTEXT_LENGTH


def test_reranker_with_a_template_of_its_own(runner: RunnerProcess, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "m.gguf", pooling=Pooling.RANK, rerank_template=RERANK, n_ctx=64)
    runner.load(path)
    filled = RERANK.replace("{query}", "the {document}").replace("d {document}", "d water")
    expected = runner.call(tokenize=frames_pb2.Tokenize(text=filled)).tokenized.tokens
    assert list(runner.embed("water", query="the {document}").tokens) == [len(expected)]
    (tokens,) = runner.embed("water " * 200, query="the", truncate=True).tokens
    assert 60 <= tokens <= 64


def test_empty_text_is_what_the_model_starts_with(bert: RunnerProcess, runner: RunnerProcess, models: Path) -> None:
    assert list(bert.embed("").tokens) == [2]
    runner.load(models / "no-start.gguf")
    assert list(runner.embed("", "water").tokens) == [1, 1]


@pytest.mark.parametrize(
    ("file", "embed", "capability"),
    [
        ("bert-MEAN", Embed(inputs=["x"], query="y"), "rerank"),
        ("plain", Embed(inputs=["x"], query="y"), "rerank"),
        ("rank", Embed(inputs=["x"]), "embedding"),
    ],
)
def test_model_that_cannot_says_what_it_lacks(
    runner: RunnerProcess, models: Path, file: str, embed: frames_pb2.Embed, capability: str
) -> None:
    runner.load(models / f"{file}.gguf")
    failure = failed(runner.call(embed=embed))
    assert (failure.kind, failure.field) == (Failed.KIND_CAPABILITY, capability)


def test_model_that_only_embeds_does_not_generate(bert: RunnerProcess) -> None:
    for answer in (bert.ask("the people"), bert.ask(chat=[("user", "x")])):
        assert (answer.failure.kind, answer.failure.field) == (Failed.KIND_CAPABILITY, "completion")


# The end of a request


def test_request_that_is_taken_back_has_one_end_and_leaves_nothing(bert: RunnerProcess) -> None:
    with bert.paused():
        first = bert.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=TEXTS * 200)))
        other = bert.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=["water " * 15_000], truncate=True)))
        bert.cancel(first)
        bert.cancel(other)
    assert failed(bert.reply(first)).kind == Failed.KIND_CANCELLED
    assert failed(bert.reply(other)).kind == Failed.KIND_CANCELLED
    assert bert.ping().queued == 0
    assert len(bert.embed("water").vectors) == 1
    assert (bert.answers[first].terminals, bert.answers[other].terminals) == (1, 1)


def test_text_in_pieces_that_is_taken_back_does_not_stay_in_memory(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "llama-MEAN.gguf", num_ctx=1024)
    before = arrays(runner.embed("water"))[0]
    calls = [runner.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=[LONG * 6] * 3))) for _ in range(8)]
    for call in calls:
        runner.cancel(call)
    np.testing.assert_array_equal(arrays(runner.embed("water"))[0], before)


def test_request_whose_time_is_up_fails(bert: RunnerProcess) -> None:
    call = bert.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=TEXTS * 20_000, timeout_ms=1)))
    assert failed(bert.reply(call)).kind == Failed.KIND_DEADLINE
    assert bert.ping().queued == 0


def test_drain_finishes_what_was_asked(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "bert-MEAN.gguf")
    call = runner.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=TEXTS * 100)))
    runner.drain()
    assert len(runner.reply(call).embedded.vectors) == 500
    assert runner.wait() == 0


def test_second_context_grows_with_the_texts(plain: RunnerProcess) -> None:
    """A model that generates gets its second context for 512 tokens, and a larger one when a longer text comes."""
    small = arrays(plain.embed("water"))[0]
    assert plain.embed(LONG * 6).tokens[0] > 512
    np.testing.assert_array_equal(arrays(plain.embed("water"))[0], small)


@pytest.fixture
def slow(runner: RunnerProcess, tmp_path: Path) -> RunnerProcess:
    """A runner that reads a long text as a whole, for seconds, while nothing else can be done."""
    size: dict[str, Any] = {"n_layer": 3, "n_embd": 512, "n_ff": 2048, "n_head": 8, "n_ctx": 2048}
    runner.load(make_tiny_llama(tmp_path / "slow.gguf", pooling=Pooling.MEAN, causal=False, **size), num_ctx=2048)
    return runner


def long_text(runner: RunnerProcess, **options: Any) -> int:
    """Send a text that takes seconds; return when the runner reads it, which it does after what it has received."""
    call = runner.start_call(frames_pb2.DaemonFrame(embed=Embed(inputs=["water " * 2000], **options)))
    runner.ping()
    return call


def cpu_seconds(runner: RunnerProcess) -> float:
    times = psutil.Process(runner.process.pid).cpu_times()
    return times.user + times.system


def test_pings_are_answered_while_a_long_text_is_read(slow: RunnerProcess) -> None:
    call = long_text(slow)
    slow.ping()
    assert call not in slow.replies, "the text took no time; nothing is shown"
    assert slow.reply(call).embedded.tokens[0] > 2000


def test_long_text_that_is_taken_back_is_read_no_further(slow: RunnerProcess) -> None:
    call = long_text(slow)
    started = cpu_seconds(slow)
    slow.cancel(call)
    assert failed(slow.reply(call)).kind == Failed.KIND_CANCELLED
    cancelled = cpu_seconds(slow) - started
    whole = long_text(slow)
    started = cpu_seconds(slow)
    slow.reply(whole)
    assert cancelled < 0.5 * (cpu_seconds(slow) - started)
    assert len(slow.embed("water").vectors) == 1


def test_long_text_whose_time_is_up_is_read_no_further(slow: RunnerProcess) -> None:
    call = long_text(slow, timeout_ms=300)
    assert failed(slow.reply(call)).kind == Failed.KIND_DEADLINE
    # What came meanwhile is served after it.
    assert len(slow.embed("water").vectors) == 1
