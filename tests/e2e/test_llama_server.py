"""What clients of llama-server ask for, with curl, against a real daemon."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import gguf
import pytest

from tests.support.product import Product, installed, wait_until
from tests.support.tiny_models import CHATML, make_tiny_bert, make_tiny_llama

pytestmark = pytest.mark.e2e

DOCUMENTS = ["the water was great", "they went home", "a small house"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """A daemon with a model that chats and one that ranks."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_llama(folder / "chat.gguf", chat_template=CHATML)
    make_tiny_bert(folder / "ranker.gguf", pooling=gguf.PoolingType.RANK, classifier=True)
    with installed(tmp_path_factory.mktemp("h"), LMD_HTTP_LISTEN="127.0.0.1:0") as product:
        product.start()
        for name in ("chat", "ranker"):
            product.lm("pull", str(folder / f"{name}.gguf"))
        yield product


@pytest.fixture(scope="module")
def url(served: Product) -> str:
    return str(served.json("status")["http"])


def post(url: str, body: object) -> tuple[int, Any]:
    command = ["curl", "-s", "-w", "\n%{http_code}", "-d", "@-", url]
    done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=True, timeout=30)
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(answer)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v1/reranking", "/reranking"])
def test_documents_are_ranked_as_by_lm(served: Product, url: str, path: str) -> None:
    status, answer = post(url + path, {"model": "ranker", "query": "water", "documents": DOCUMENTS})
    assert status == 200
    assert (answer["model"], answer["object"]) == ("ranker", "list")
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 10
    ours = served.json("rerank", "ranker", "water", *DOCUMENTS)["results"]
    assert [(one["index"], one["relevance_score"]) for one in answer["results"]] == [
        (one["index"], pytest.approx(one["score"], abs=1e-5)) for one in ours
    ]


def test_ranking_in_the_other_shape(url: str) -> None:
    body = {"model": "ranker", "query": "water", "texts": DOCUMENTS, "top_n": 2, "return_text": True}
    status, answer = post(f"{url}/rerank", body)
    assert status == 200
    assert len(answer) == 2
    assert answer[0]["score"] >= answer[1]["score"]
    assert [one["text"] for one in answer] == [DOCUMENTS[one["index"]] for one in answer]
    assert post(f"{url}/rerank", {**body, "top_n": 0}) == (200, [])


def test_tokens_there_and_back(url: str) -> None:
    status, answer = post(f"{url}/tokenize", {"model": "chat", "content": "the water"})
    assert (status, set(answer)) == (200, {"tokens"})
    plain = answer["tokens"]
    _, special = post(f"{url}/tokenize", {"model": "chat", "content": "the water", "add_special": True})
    assert special["tokens"] == [1, *plain]
    _, pieces = post(f"{url}/tokenize", {"model": "chat", "content": "the water é", "with_pieces": True})
    assert pieces["tokens"][:2] == [{"id": plain[0], "piece": " the"}, {"id": plain[1], "piece": " water"}]
    # The vocabulary has no é; its bytes are tokens, and no text by themselves.
    assert [piece["piece"] for piece in pieces["tokens"][-2:]] == [[0xC3], [0xA9]]
    assert post(f"{url}/detokenize", {"model": "chat", "tokens": plain}) == (200, {"content": "the water"})
    _, marked = post(f"{url}/tokenize", {"model": "chat", "content": "<|im_end|>"})
    _, unmarked = post(f"{url}/tokenize", {"model": "chat", "content": "<|im_end|>", "parse_special": False})
    assert 4 in marked["tokens"]
    assert 4 not in unmarked["tokens"]


def test_template(url: str) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert post(f"{url}/apply-template", body) == (200, {"prompt": expected})


def test_model_that_is_resident_needs_no_name(served: Product, url: str) -> None:
    for name in ("chat", "ranker"):
        served.lm("stop", name, code=None)
    wait_until(lambda: served.json("ps") == [], "no model is resident")
    status, answer = post(f"{url}/tokenize", {"content": "water"})
    assert status == 400
    assert answer["error"]["code"] == 400
    assert "`model` is missing" in answer["error"]["message"]
    _, named = post(f"{url}/tokenize", {"model": "chat", "content": "water"})
    assert post(f"{url}/tokenize", {"content": "water"}) == (200, named)
    post(f"{url}/rerank", {"model": "ranker", "query": "water", "documents": DOCUMENTS})
    assert post(f"{url}/tokenize", {"content": "water"})[0] == 400


def test_errors_have_the_shape(url: str) -> None:
    for path, body, status, kind in (
        ("/rerank", {"model": "chat", "query": "x", "documents": ["y"]}, 400, "invalid_request_error"),
        ("/rerank", {"model": "ranker", "query": "x"}, 400, "invalid_request_error"),
        ("/rerank", {"model": "ranker", "query": "x", "documents": []}, 400, "invalid_request_error"),
        ("/rerank", {"model": "ranker", "query": "x", "documents": ["y " * 500]}, 400, "exceed_context_size_error"),
        ("/rerank", {"model": "nobody", "query": "x", "documents": ["y"]}, 404, "not_found_error"),
        ("/tokenize", {"model": "chat"}, 400, "invalid_request_error"),
        ("/tokenize", {"model": "chat", "content": 5}, 400, "invalid_request_error"),
        ("/detokenize", {"model": "chat", "tokens": [10**9]}, 400, "invalid_request_error"),
        ("/detokenize", {"model": "chat", "tokens": [-1]}, 400, "invalid_request_error"),
        ("/detokenize", {"model": "chat", "tokens": [10**30]}, 400, "invalid_request_error"),
        ("/apply-template", {"model": "ranker", "messages": [{"role": "user"}]}, 400, "invalid_request_error"),
        ("/apply-template", {"model": "chat", "messages": []}, 400, "invalid_request_error"),
    ):
        got, answer = post(url + path, body)
        assert (got, answer["error"]["code"], answer["error"]["type"]) == (status, status, kind), (path, body, answer)
        assert answer["error"]["message"]
