"""Embeddings, ranks, and what a model reads, as a user asks for them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from tests.support.product import Product
from tests.support.tiny_models import make_tiny_bert

pytestmark = pytest.mark.e2e

IN_PROCESS = """
import json, sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=128, embedding=True, verbose=False)
print(json.dumps(llm.embed(sys.argv[2], normalize=True)))
"""


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return make_tiny_bert(tmp_path / "encoder.gguf", pooling=gguf.PoolingType.CLS)


@pytest.fixture
def ranker(tmp_path: Path) -> Path:
    return make_tiny_bert(tmp_path / "ranker.gguf", pooling=gguf.PoolingType.RANK, classifier=True)


def test_vectors_are_those_of_the_engine_in_process(product: Product, encoder: Path) -> None:
    product.start()
    text = "the people went to the house"
    found = product.json("embed", str(encoder), text, "water")
    command = [sys.executable, "-c", IN_PROCESS, str(encoder), text]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["embeddings"][0] == pytest.approx(theirs, abs=1e-4)
    assert math.hypot(*found["embeddings"][1]) == pytest.approx(1, abs=1e-5)
    assert found["tokens"] == [8, 3]
    (runner,) = product.json("ps")
    assert (runner["state"], runner["context_length"]) == ("ready", 128)


def test_models_say_what_they_are_for(product: Product, encoder: Path, ranker: Path) -> None:
    product.start()
    for path in (encoder, ranker):
        product.lm("pull", str(path))
    assert product.json("show", str(encoder))["capabilities"] == ["embedding"]
    assert product.json("show", str(ranker))["capabilities"] == ["rerank"]
    for args in (
        ("run", str(encoder), "hello"),
        ("rerank", str(encoder), "hello", "there"),
        ("embed", str(ranker), "hello"),
        ("tokenize", "--chat", str(encoder), "hello"),
    ):
        failed = product.lm(*args, "--json", code=1)
        assert json.loads(failed.stderr)["error"]["reason"] == "CAPABILITY_MISSING", args


def test_documents_are_ranked(product: Product, ranker: Path) -> None:
    product.start()
    documents = ["the water was great", "they went home", "a small house"]
    ranking = product.json("rerank", str(ranker), "water", *documents)
    scores = [result["score"] for result in ranking["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(result["index"] for result in ranking["results"]) == [0, 1, 2]
    alone = product.json("rerank", str(ranker), "water", documents[2])
    (same,) = (result for result in ranking["results"] if result["index"] == 2)
    assert alone["results"][0]["score"] == pytest.approx(same["score"], abs=1e-3)


def test_text_that_is_too_long(product: Product, encoder: Path) -> None:
    product.start()
    product.lm("pull", str(encoder))
    failed = product.lm("embed", str(encoder), "water " * 500, "--json", code=1)
    error = json.loads(failed.stderr)["error"]
    assert (error["reason"], error["metadata"]["prompt_tokens"], error["metadata"]["context_tokens"]) == (
        "CONTEXT_LENGTH_EXCEEDED",
        "502",
        "128",
    )
    assert "truncate" in error["hint"]
    assert product.json("embed", str(encoder), "water " * 500, "--truncate")["tokens"] == [128]


def test_model_that_chats_embeds_as_well_and_shows_its_prompt(product: Product) -> None:
    product.start()
    product.lm("pull", "hf.co/test/chat")
    (vector,) = product.json("embed", "hf.co/test/chat", "hello there")["embeddings"]
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
    prompt = product.lm("tokenize", "--chat", "hf.co/test/chat", "hello there")
    assert prompt.stdout == "<user>hello there</user><assistant>"
    ids = product.lm("tokenize", "--ids", "hf.co/test/chat", "the water").stdout
    assert product.lm("tokenize", "--decode", "hf.co/test/chat", ids).stdout.strip() == "the water"
    assert product.json("run", "hf.co/test/chat", "hello", "-o", "num_predict=2")["generated_tokens"] == 2
