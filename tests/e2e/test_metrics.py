"""What Prometheus sees of a real daemon: counters add up after known requests, whichever way they came."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families

from lmd.v1.version import __version__
from tests.support.hub import HubServer
from tests.support.metric_docs import exercised
from tests.support.metrics import Values
from tests.support.ollama import Gateway, Reply, gateway
from tests.support.product import Product, installed, wait_until
from tests.support.shared_models import STORIES
from tests.support.tiny_models import CHATML, make_tiny_llama

pytestmark = pytest.mark.e2e

FOUR = {"temperature": 0, "num_predict": 4}


def get(url: str, path: str, **headers: str) -> Reply:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, found.get("content-type", ""), found, response.read())
    finally:
        connection.close()


def scraped(product: Product) -> Values:
    return Values(get(product.http_url, "/metrics").body.decode())


@pytest.fixture
def pulled(product: Product) -> Gateway:
    """A daemon that has pulled a model and not loaded it."""
    product.start()
    product.lm("pull", "hf.co/test/stories")
    return gateway(product)


MODEL = "hf.co/test/stories:latest"


def test_counters_add_up_after_known_requests(product: Product, pulled: Gateway) -> None:
    before = scraped(product)
    assert before("lmd_pulls_total", outcome="succeeded") == 1
    assert before("lmd_pull_received_bytes_total") == STORIES.stat().st_size
    assert before("lmd_pulls_running") == 0
    assert before.labelled("lmd_model_memory_bytes") == []

    options = [part for name, value in FOUR.items() for part in ("-o", f"{name}={value}")]
    first = product.json("run", MODEL, "Once upon a time", *options)
    body = {"model": MODEL, "prompt": "Once upon a time", "options": FOUR, "raw": True}
    told = [pulled.post("/api/generate", body).lines[-1], pulled.post("/api/generate", body | {"stream": False}).json]
    completion = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "stream": True}
    assert pulled.post("/v1/completions", completion).status == 200
    after = scraped(product)

    def more(name: str, **labels: str) -> float:
        return (after(name, **labels) or 0) - (before(name, **labels) or 0)

    assert more("lmd_requests_total", api="grpc", route="InferenceService/Generate", outcome="ok") == 1
    assert more("lmd_requests_total", api="ollama", route="/api/generate", outcome="ok") == 2
    assert more("lmd_requests_total", api="openai", route="/v1/completions", outcome="ok") == 1
    assert more("lmd_request_duration_seconds_count", api="ollama", route="/api/generate") == 2
    assert more("lmd_generated_tokens_total") == 16
    prompts = [first["prompt_tokens"], *(one["prompt_eval_count"] for one in told)]
    assert more("lmd_prompt_tokens_total") == sum(prompts) + prompts[0]
    assert more("lmd_time_to_first_token_seconds_count", operation="generate") == 4
    assert more("lmd_work_duration_seconds_count", operation="generate") == 4
    assert more("lmd_queue_wait_seconds_count") == 4
    assert more("lmd_load_wait_seconds_count") == 1
    assert more("lmd_prefix_cache_lookups_total", result="miss") == 1
    assert more("lmd_prefix_cache_lookups_total", result="hit") == 3
    assert more("lmd_cached_prompt_tokens_total") > 0
    assert after("lmd_requests_running", transport="grpc") == 0
    assert after("lmd_requests_running", transport="http") == 1  # the one that asks

    ((labels, memory_bytes),) = after.labelled("lmd_model_memory_bytes")
    (runner,) = product.json("ps")
    assert labels == {"model": MODEL, "digest": runner["digest"].removeprefix("sha256:")[:12]}
    assert memory_bytes == runner["memory_bytes"]
    assert after("lmd_model_state", state="ready", **labels) == 1
    assert after("lmd_model_slots_busy", **labels) == 0

    # What the runner tells comes with its next sign of life.
    wait_until(lambda: scraped(product)("lmd_model_generated_tokens_total", **labels) == 16, "the runner has told")
    told_by_runner = scraped(product)
    assert told_by_runner("lmd_model_prefix_cache_hits_total", **labels) == 3
    assert (told_by_runner("lmd_model_kv_used_tokens", **labels) or 0) > 0
    assert told_by_runner("lmd_model_kv_size_tokens", **labels) >= 256  # type: ignore[operator]

    product.lm("stop", MODEL)
    assert scraped(product).labelled("lmd_model_memory_bytes") == []


def test_failures_are_counted_by_reason_wherever_they_are_told(product: Product, pulled: Gateway) -> None:
    product.lm("show", "nosuch", code=None)
    assert pulled.post("/api/generate", {"model": "nosuch", "prompt": "x"}).status == 404
    chat = {"model": "nosuch", "messages": [{"role": "user", "content": "x"}]}
    assert pulled.post("/v1/chat/completions", chat).status == 404
    assert pulled.post("/api/generate", raw=b"{").status == 400
    assert pulled.post("/api/nosuch", {}).status == 404
    assert pulled.post("/metrics", {}).status == 405
    # Told inside of a stream that has begun, with status 200.
    lines = pulled.post("/api/pull", {"model": "hf.co/test/nope"}).lines
    assert "error" in lines[-1]
    found = scraped(product)
    errors = {
        (labels["api"], labels["route"], labels["outcome"]): value
        for labels, value in found.labelled("lmd_requests_total")
        if labels["outcome"] != "ok"
    }
    assert errors == {
        ("grpc", "ModelService/GetModel", "MODEL_NOT_FOUND"): 1,
        ("ollama", "/api/generate", "MODEL_NOT_FOUND"): 1,
        ("openai", "/v1/chat/completions", "MODEL_NOT_FOUND"): 1,
        ("ollama", "/api/generate", "INVALID_ARGUMENT"): 1,
        ("none", "none", "http_404"): 1,
        ("none", "none", "http_405"): 1,
        ("ollama", "/api/pull", "SOURCE_NOT_FOUND"): 1,
    }
    assert found("lmd_errors_total", reason="MODEL_NOT_FOUND") == 3
    assert found("lmd_errors_total", reason="SOURCE_NOT_FOUND") == 1
    assert found("lmd_errors_total", reason="INVALID_ARGUMENT") == 1
    assert found("lmd_pulls_total", outcome="failed") == 1
    assert b"nosuch" not in get(product.http_url, "/metrics").body
    assert b"nope" not in get(product.http_url, "/metrics").body


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """A daemon with a model that takes a while for each token and does not end by itself."""
    path = make_tiny_llama(
        tmp_path_factory.mktemp("m") / "slow.gguf", n_layer=8, n_embd=512, n_ctx=4096, chat_template=CHATML
    )
    with installed(tmp_path_factory.mktemp("h"), LMD_RUNTIME_SLOTS="1") as product:
        product.start()
        product.lm("pull", str(path))
        yield product


def test_a_client_that_leaves_is_counted_with_what_it_got(slow: Product) -> None:
    connection = http.client.HTTPConnection(urlsplit(slow.http_url).netloc, timeout=60)
    before = scraped(slow)
    body = {"model": "slow", "messages": [{"role": "user", "content": "x"}], "options": {"num_predict": 3000}}
    connection.request("POST", "/api/chat", json.dumps(body))
    response = connection.getresponse()
    assert json.loads(response.readline())["message"]["role"] == "assistant"
    during = scraped(slow)
    assert during("lmd_requests_running", transport="http") == 2
    ((labels, _),) = during.labelled("lmd_model_memory_bytes")
    assert during("lmd_model_slots_busy", **labels) == 1
    connection.close()

    def left() -> bool:
        now = scraped(slow)
        return now("lmd_requests_total", api="ollama", route="/api/chat", outcome="cancelled") == 1

    wait_until(left, "the request has ended")
    after = scraped(slow)
    generated = (after("lmd_generated_tokens_total") or 0) - (before("lmd_generated_tokens_total") or 0)
    assert 1 <= generated < 3000
    assert (after("lmd_prompt_tokens_total") or 0) > (before("lmd_prompt_tokens_total") or 0)
    assert after("lmd_work_duration_seconds_count", operation="chat") is None
    wait_until(lambda: scraped(slow)("lmd_model_slots_busy", **labels) == 0, "the slot is free")


def test_a_client_of_the_api_that_is_killed_is_counted_so(slow: Product) -> None:
    client = slow.spawn_lm("run", "slow", "x", "-o", "num_predict=3000")
    wait_until(lambda: sum(v for _, v in scraped(slow).labelled("lmd_model_slots_busy")) == 1, "the answer runs")
    client.kill()
    client.communicate(timeout=30)

    def left() -> bool:
        ended = scraped(slow).labelled("lmd_requests_total")
        found = {(labels["route"], labels["outcome"]): value for labels, value in ended if labels["api"] == "grpc"}
        return any(found.get((f"InferenceService/{name}", "cancelled")) == 1 for name in ("Chat", "Generate"))

    wait_until(left, "the request has ended")
    wait_until(lambda: sum(v for _, v in scraped(slow).labelled("lmd_model_slots_busy")) == 0, "the slot is free")


def test_both_formats_and_everything_that_is_documented(product: Product, hub: HubServer) -> None:
    product.start()
    plain = get(product.http_url, "/metrics")
    assert plain.content_type == "text/plain; version=0.0.4; charset=utf-8"
    names = {line.split()[2] for line in plain.body.decode().splitlines() if line.startswith("# TYPE")}
    # Those that have had no request yet are announced as well.
    wanted = {family.name for family in exercised().scrape().collect()}
    assert {name.removesuffix("_total").removesuffix("_info").removesuffix("_created") for name in names} >= wanted
    wanted_accept = "application/openmetrics-text; version=1.0.0; charset=utf-8, text/plain; q=0.5"
    open_metrics = get(product.http_url, "/metrics", accept=wanted_accept)
    assert open_metrics.content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    families = {family.name: family for family in open_families(open_metrics.body.decode())}  # type: ignore[no-untyped-call]
    (build,) = families["lmd_build"].samples
    assert build.labels["version"] == __version__
    assert build.labels["engine_version"]
    assert families["process_resident_memory_bytes"].samples[0].value > 1 << 20


def test_pages_and_strangers_do_not_read_it(product: Product, hub: HubServer) -> None:
    product.start()
    url = product.http_url
    assert get(url, "/metrics", origin="https://evil.example").status == 403
    assert get(url, "/metrics", host="evil.example").status == 403
    assert scraped(product)("lmd_requests_total", api="none", route="none", outcome="PERMISSION_DENIED") == 2
