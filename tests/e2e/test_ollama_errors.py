"""What Ollama's routes that run models say when something is wrong: statuses and bodies as clients know them."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.ollama import LONG_CTX, Gateway, Reply, gateway, install_models
from tests.support.product import Product, installed, wait_until

pytestmark = pytest.mark.e2e

ROUTES = ("/api/generate", "/api/chat", "/api/embed", "/api/embeddings")
ANSWERS = ("/api/generate", "/api/chat")
HI = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "input": "hi"}
BUSY = "server busy, please try again.  maximum pending requests exceeded"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """An installation whose daemon runs, for one answer at a time and one that waits."""
    env = {"LMD_HTTP_LISTEN": "127.0.0.1:0", "LMD_RUNTIME_SLOTS": "1", "LMD_RUNTIME_MAX_QUEUE": "1"}
    with installed(tmp_path_factory.mktemp("h"), **env) as product:
        product.start()
        install_models(product, tmp_path_factory.mktemp("models"))
        yield product


@pytest.fixture(scope="module")
def api(running: Product) -> Gateway:
    return gateway(running)


def told(reply: Reply) -> tuple[int, str]:
    """Return the status and the error of a failure, which has one form for all."""
    assert reply.content_type == "application/json; charset=utf-8"
    assert list(reply.json) == ["error"]
    return reply.status, reply.json["error"]


# Ollama's table


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/api/generate", {}, 404, "model '' not found"),
        ("/api/generate", {"model": ""}, 404, "model '' not found"),
        ("/api/generate", {"model": None}, 404, "model '' not found"),
        ("/api/chat", {}, 400, "model is required"),
        ("/api/embed", {}, 404, "model '' not found"),
        ("/api/embeddings", {}, 400, "model is required"),
        *((path, {"model": name}, 400, "invalid model name") for path in ROUTES for name in ("a b", "a:b:c", "../x")),
        *((path, {"model": "None:8b"}, 404, "model 'None:8b' not found") for path in ANSWERS),
        ("/api/embed", {"model": "none"}, 404, 'model "none" not found, try pulling it first'),
        ("/api/embeddings", {"model": "none"}, 404, 'model "none" not found, try pulling it first'),
        ("/api/chat", {**HI, "model": "stories"}, 400, '"stories" does not support chat'),
        ("/api/chat", {**HI, "model": "encoder"}, 400, '"encoder" does not support chat'),
        ("/api/generate", {**HI, "model": "encoder"}, 400, '"encoder" does not support generate'),
        ("/api/generate", {**HI, "model": "chat", "think": True}, 400, '"chat" does not support thinking'),
        ("/api/chat", {**HI, "model": "chat", "think": "low"}, 400, '"chat" does not support thinking'),
        (
            "/api/chat",
            {**HI, "model": "chat:latest", "tools": [{"type": "function", "function": {"name": "f"}}]},
            400,
            "chat:latest does not support tools",
        ),
        ("/api/generate", {**HI, "model": "chat", "suffix": "!"}, 400, "chat does not support insert"),
        *(
            (
                "/api/generate",
                {**HI, "model": "chat", "raw": True, **more},
                400,
                "raw mode does not support template, system, or context",
            )
            for more in ({"template": "x"}, {"system": "x"}, {"context": [1]})
        ),
        *(
            (path, {"model": "chat", "top_logprobs": count}, 400, "top_logprobs must be between 0 and 20")
            for path in ANSWERS
            for count in (-1, 21)
        ),
        *(
            (
                path,
                {**HI, "model": "chat", "think": "hard"},
                400,
                'think must be true, false, "low", "medium", "high" or "max", not "hard"',
            )
            for path in ANSWERS
        ),
        *(
            (
                path,
                {"model": "chat", "keep_alive": "300"},
                400,
                'keep_alive "300" has no unit: write 300, "300s" or "5m", or -1 for ever',
            )
            for path in ROUTES
        ),
        *(
            (
                path,
                {"model": "chat", "keep_alive": [5]},
                400,
                'keep_alive must be a number of seconds or a duration such as "5m", not an array',
            )
            for path in ROUTES
        ),
        *(
            (path, {**HI, "model": "chat", "options": options}, 500, f'option "{name}" must be of type {kind}')
            for path in ROUTES
            for name, kind, options in (
                ("num_ctx", "integer", {"num_ctx": "x"}),
                ("use_mmap", "boolean", {"use_mmap": 1}),
                ("temperature", "float32", {"temperature": "x"}),
                ("stop", "array", {"stop": "x"}),
            )
        ),
        ("/api/embed", {"model": "encoder", "input": 5}, 400, "invalid input type"),
        ("/api/embed", {"model": "encoder", "input": ["a", 5]}, 400, "invalid input type"),
        (
            "/api/embed",
            {"model": "encoder", "input": "water " * 500, "truncate": False},
            400,
            "the input length exceeds the context length",
        ),
        ("/api/embed", {**HI, "model": "ranker"}, 400, '"ranker" does not support embedding'),
        ("/api/generate", {**HI, "model": "chat", "context": [1, 2]}, 400, None),
        ("/api/generate", {**HI, "model": "chat", "options": {"top_p": 2}}, 400, None),
        ("/api/embed", {**HI, "model": "encoder", "dimensions": -1}, 400, None),
        *((path, {**HI, "model": "chat", "format": "xml"}, 400, None) for path in ANSWERS),
        *((path, {**HI, "model": "chat", "format": {"type": 5}}, 400, None) for path in ANSWERS),
        ("/api/chat", {"model": "chat", "messages": [{"role": "robot", "content": "x"}]}, 400, None),
        ("/api/generate", {**HI, "model": "chat", "images": ["aGVsbG8="]}, 400, None),
        ("/api/generate", {**HI, "model": "chat", "images": ["?"]}, 400, "images must be texts in base64"),
        (
            "/api/chat",
            {"model": "chat", "messages": [{"role": "user", "content": "x", "images": ["aGVsbG8="]}]},
            400,
            '"chat" does not support images: this version has no projectors',
        ),
        ("/api/generate", {"model": "chat", "prompt": "water " * 999, "shift": False}, 400, None),
        ("/api/chat", {"model": "chat", "messages": [{"role": "user", "content": "water " * 999}]}, 400, None),
    ],
)
def test_the_table_of_errors(api: Gateway, path: str, body: object, status: int, error: str | None) -> None:
    for stream in ({}, {"stream": False}):
        found = told(api.post(path, {**body, **stream}))  # type: ignore[dict-item]
        assert found == (status, error or found[1])


def test_what_is_checked_first(api: Gateway) -> None:
    """Each request is wrong in several ways, and is told the first."""
    wrong: dict[str, Any] = {"raw": True, "system": "x", "think": True, "options": {"num_ctx": "x"}}
    assert told(api.post("/api/generate", {**wrong, "think": 5, "top_logprobs": 99}))[1].startswith("think must be")
    assert told(api.post("/api/generate", {**wrong, "top_logprobs": 99}))[1].startswith("top_logprobs must")
    assert told(api.post("/api/generate", wrong)) == (404, "model '' not found")
    assert told(api.post("/api/generate", {**wrong, "model": "a b"})) == (400, "invalid model name")
    assert told(api.post("/api/generate", {**wrong, "model": "none"})) == (404, "model 'none' not found")
    unloaded = api.post("/api/generate", {**wrong, "model": "chat", "keep_alive": 0})
    assert unloaded.json["done_reason"] == "unload"
    assert told(api.post("/api/generate", {**wrong, "model": "chat"}))[1].startswith("raw mode does not")
    assert told(api.post("/api/generate", {**wrong, "model": "chat", "raw": False}))[1].endswith("thinking")
    del wrong["think"]
    assert told(api.post("/api/generate", {**wrong, "model": "chat", "raw": False}))[0] == 500


# Bodies


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "missing request body"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"model"', "must be a JSON object"),
        (b"{'model': 'chat'}", "not JSON"),
        (b'{"model": "chat"} x', "not JSON"),
        (b'{"model": NaN}', "NaN"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"model": "chat", "model": "full"}', "twice"),
        (b'{"model": "chat", "options": ' + b"[" * 5000 + b"]" * 5000 + b"}", "deep"),
        (b'{"model": 5}', "model"),
        (b'{"model": ["chat"]}', "model"),
        (b'{"model": "chat", "options": []}', "options"),
    ],
)
def test_bodies_that_are_no_requests(api: Gateway, path: str, raw: bytes, said: str) -> None:
    status, error = told(api.post(path, raw=raw))
    assert status == 400
    assert said in error


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *((path, "stream", "yes") for path in ANSWERS),
        *((path, "truncate", 1) for path in ANSWERS),
        *((path, "logprobs", "x") for path in ANSWERS),
        *((path, "top_logprobs", 1.5) for path in ANSWERS),
        ("/api/generate", "prompt", 5),
        ("/api/generate", "context", "x"),
        ("/api/generate", "images", "x"),
        ("/api/chat", "messages", {}),
        ("/api/chat", "messages", ["x"]),
        ("/api/chat", "messages", [{"content": "x"}]),
        ("/api/chat", "messages", [{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        ("/api/chat", "messages", [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]),
        ("/api/chat", "tools", [{"function": "f"}]),
        ("/api/embed", "dimensions", "8"),
        ("/api/embed", "truncate", "no"),
        ("/api/embeddings", "prompt", ["x"]),
    ],
)
def test_fields_of_the_wrong_kind_are_named(api: Gateway, path: str, field: str, value: object) -> None:
    status, error = told(api.post(path, {"model": "chat", field: value}))
    assert status == 400
    assert field in error


def test_half_a_character_is_none(api: Gateway) -> None:
    reply = api.post("/api/generate", raw=b'{"model": "no\\ud800ne"}')
    assert told(reply)[0] == 400
    said = api.post("/api/generate", raw=b'{"model": "script", "prompt": "\\ud800", "stream": false}')
    assert said.status == 200


# While it runs


LONG = {"model": "long", "prompt": "the people", "options": {"num_ctx": LONG_CTX}}
SHORT = {**LONG, "options": {"num_ctx": LONG_CTX, "num_predict": 2}, "stream": False}


def runner_of(product: Product) -> dict[str, Any]:
    (runner,) = [runner for runner in product.json("ps") if runner["name"] == "long:latest"]
    return dict(runner)


def test_a_full_queue_is_told_at_once(running: Product, api: Gateway) -> None:
    with api.stream("/api/generate", LONG) as first:
        assert json.loads(first.readline())["response"]
        waits = threading.Thread(target=lambda: api.post("/api/generate", SHORT))
        waits.start()
        wait_until(lambda: runner_of(running)["queued"] == 1, "one request waits")
        refused = api.post("/api/generate", LONG)
        assert told(refused) == (503, BUSY)
        assert int(refused.headers["retry-after"]) >= 1
    waits.join(60)
    assert not waits.is_alive()


def test_a_runner_that_dies_ends_the_stream_with_an_error(running: Product, api: Gateway) -> None:
    with api.stream("/api/generate", LONG) as answer:
        assert answer.status == 200
        assert json.loads(answer.readline())["response"]
        os.kill(runner_of(running)["pid"], signal.SIGKILL)
        *_, last = answer.read().splitlines()
    assert list(json.loads(last)) == ["error"]
    assert "died" in json.loads(last)["error"]
    assert api.post("/api/generate", SHORT).json["eval_count"] == 2
