"""What is counted, and what becomes a label."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from lmd.daemon.answer_events import Delta, Done
from lmd.daemon.errors import EngineFailed
from lmd.daemon.http.counting import CountRequests, api_of
from lmd.daemon.metrics import Metrics
from lmd.daemon.outcomes import REASONS, note_failure, reason_of
from lmd.daemon.pull_job import State
from lmd.daemon.residency.values import RunnerStatus
from lmd.daemon.resident_metrics import Holdings
from lmd.daemon.runner_answer import Answer
from lmd.daemon.runner_stats import EngineStats
from lmd.registry.digest import Digest
from lmd.registry.errors import LmdError, ModelNotFound
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.metrics import Values
from tests.support.runner_statuses import runner_status

DONE = Done("stop", 10, 4, 3, 2_000_000_000, 500_000_000, 250_000_000, 1, 1, 0, "", drafted_tokens=5, accepted_tokens=2)


def values(metrics: Metrics, accept: str = "") -> Values:
    return Values(metrics.scrape().render(accept)[0].decode())


def runner(name: str, digest: str, *, stats: EngineStats | None = None) -> RunnerStatus:
    return runner_status(
        name=name,
        digest=Digest.of(digest.encode()),
        memory_bytes=1000,
        vram_bytes=300,
        slots=4,
        slots_busy=3,
        queued=2,
        stats=stats,
    )


def test_a_finished_answer_counts_with_what_its_runner_said() -> None:
    metrics = Metrics()
    with metrics.work.answer("chat") as meter:
        meter.note([Delta("a", 1)])
        meter.note([Delta("b", 2), Delta("c", 3)])
        meter.done = DONE
    found = values(metrics)
    assert found("lmd_prompt_tokens_total") == 10
    assert found("lmd_cached_prompt_tokens_total") == 4
    assert found("lmd_generated_tokens_total") == 3
    assert found("lmd_drafted_tokens_total") == 5
    assert found("lmd_accepted_tokens_total") == 2
    assert found("lmd_prefix_cache_lookups_total", result="hit") == 1
    assert found("lmd_prefix_cache_lookups_total", result="miss") == 0
    assert found("lmd_time_to_first_token_seconds_count", operation="chat") == 1
    assert found("lmd_work_duration_seconds_sum", operation="chat") == 2
    assert found("lmd_queue_wait_seconds_sum") == 0.25
    assert found("lmd_load_wait_seconds_sum") == 0.5


def test_an_answer_that_breaks_off_counts_with_what_was_handed_on() -> None:
    metrics = Metrics()
    answer = Answer(1, lambda request_id: None)
    answer.note_started(frames.Started(prompt_tokens=7))

    def breaks_off() -> None:
        with metrics.request("grpc", "grpc", "InferenceService/Chat"), metrics.work.answer("chat") as meter:
            meter.answer = answer
            meter.note([Delta("a", 2, choice=0), Delta("b", 5, choice=1)])
            raise EngineFailed("m", "x", log="")

    with pytest.raises(EngineFailed):
        breaks_off()
    found = values(metrics)
    assert found("lmd_prompt_tokens_total") == 7
    assert found("lmd_generated_tokens_total") == 7
    assert found("lmd_prefix_cache_lookups_total", result="miss") == 1
    assert found("lmd_errors_total", reason="ENGINE_FAILED") == 1
    assert found("lmd_work_duration_seconds_count", operation="chat") is None


def test_an_answer_that_never_got_a_slot_counts_nothing() -> None:
    metrics = Metrics()
    with metrics.work.answer("chat") as meter:  # a try whose runner died before it began
        meter.answer = Answer(1, lambda request_id: None)
    found = values(metrics)
    assert found("lmd_prompt_tokens_total") == 0
    assert found("lmd_prefix_cache_lookups_total", result="miss") == 0


def test_requests_end_with_ok_their_reason_or_the_caller_leaving() -> None:
    metrics = Metrics()

    def ends_with(error: BaseException | None) -> None:
        with metrics.request("grpc", "grpc", "S/M"):
            if error is not None:
                raise error

    ends_with(None)
    for error in (ModelNotFound("m"), ZeroDivisionError(), asyncio.CancelledError()):
        with pytest.raises(type(error)):
            ends_with(error)
    found = values(metrics)
    assert found.by("lmd_requests_total", "outcome") == {"ok": 1, "MODEL_NOT_FOUND": 1, "INTERNAL": 1, "cancelled": 1}
    assert found("lmd_requests_running", transport="grpc") == 0
    assert found("lmd_request_duration_seconds_count", api="grpc", route="S/M") == 4
    assert sum(found.by("lmd_errors_total", "reason").values()) == 2


def test_running_requests_are_counted_while_they_run() -> None:
    metrics = Metrics()
    with metrics.request("grpc", "grpc", "S/M"):
        assert values(metrics)("lmd_requests_running", transport="grpc") == 1


def test_every_reason_of_the_api_has_a_counter_from_the_start() -> None:
    found = values(Metrics())
    assert set(found.by("lmd_errors_total", "reason")) == set(REASONS)
    assert "MODEL_NOT_FOUND" in REASONS
    assert "UNSPECIFIED" not in REASONS


def test_a_reason_that_the_api_does_not_have_is_a_defect() -> None:
    class Strange(LmdError):
        reason = "STRANGE"

    assert reason_of(Strange("x")) == "INTERNAL"


def test_residents_are_labels_and_two_manifests_may_have_one_name() -> None:
    metrics = Metrics()
    stats = EngineStats(
        prompt_tokens=100,
        cached_tokens=40,
        generated_tokens=50,
        cache_hits=3,
        cache_misses=2,
        prefixes=7,
        kv_used=600,
        kv_size=4096,
        drafted_tokens=20,
        accepted_tokens=10,
        parked_bytes=9000,
    )
    metrics.look = lambda: Holdings(
        runners=[runner("m:latest", "new", stats=stats), runner("m:latest", "old")], tasks=5
    )
    found = values(metrics)
    new = {"digest": Digest.of(b"new").short, "model": "m:latest"}
    old = {"digest": Digest.of(b"old").short, "model": "m:latest"}
    assert found("lmd_model_memory_bytes", **new) == found("lmd_model_memory_bytes", **old) == 1000
    assert found("lmd_model_vram_bytes", **new) == 300
    assert found("lmd_model_slots_busy", **new) == 3
    assert found("lmd_model_queue_length", **new) == 2
    assert found("lmd_model_kv_used_tokens", **new) == 600
    assert found("lmd_model_parked_bytes", **new) == 9000
    assert found("lmd_model_prefix_cache_hits_total", **new) == 3
    assert found("lmd_model_prefix_cache_misses_total", **new) == 2
    assert found("lmd_model_cached_prompt_tokens_total", **new) == 40
    assert found("lmd_model_kv_used_tokens", **old) is None  # its runner has not said so yet
    assert found.by("lmd_model_state", "state") == {"loading": 0, "ready": 2, "draining": 0, "failed": 0}
    assert found("lmd_tasks") == 5


def test_models_that_are_gone_leave_no_label() -> None:
    metrics = Metrics()
    metrics.look = lambda: Holdings(runners=[runner("m:latest", "a")])
    assert values(metrics).by("lmd_model_state", "model")
    metrics.look = Holdings
    assert b"m:latest" not in metrics.scrape().render("")[0]


def test_pulls_are_counted_by_their_end() -> None:
    metrics = Metrics()
    metrics.look = lambda: Holdings(pulls_running=2, pulls_ended={State.FAILED: 3}, pull_received_bytes=99)
    found = values(metrics)
    assert found("lmd_pulls_running") == 2
    assert found("lmd_pulls_total", outcome="failed") == 3
    assert found("lmd_pulls_total", outcome="succeeded") == 0
    assert found("lmd_pull_received_bytes_total") == 99


def test_the_format_is_the_one_that_is_asked_for() -> None:
    scrape = Metrics().scrape()
    text, media_type = scrape.render("*/*")
    assert media_type.startswith("text/plain")
    assert Values(text.decode())("lmd_tasks") == 0
    text, media_type = scrape.render("application/openmetrics-text; version=1.0.0,text/plain;q=0.5")
    assert media_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    assert list(openmetrics.text_string_to_metric_families(text.decode()))  # type: ignore[no-untyped-call]


# The HTTP door

Handler = Callable[[Request], Awaitable[Response]]


async def asked(metrics: Metrics, path: str, handler: Handler, *, hang_up: bool = False) -> None:
    routes = [Route("/api/show", handler, methods=["POST"]), Route("/v1/models/{model:path}", handler)]
    app = CountRequests(Router(routes), metrics)
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET" if path.startswith("/v1") else "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if hang_up and message["type"] == "http.response.body":
            raise asyncio.CancelledError

    await app(scope, receive, send)


def outcomes(metrics: Metrics) -> dict[tuple[str, str, str], float]:
    found = values(metrics).labelled("lmd_requests_total")
    return {(labels["api"], labels["route"], labels["outcome"]): value for labels, value in found}


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "ok"),
        (400, "INVALID_ARGUMENT"),
        (403, "PERMISSION_DENIED"),
        (404, "http_404"),
        (499, "cancelled"),
        (500, "INTERNAL"),
    ],
)
async def test_statuses_are_outcomes_where_nobody_knows_more(status: int, outcome: str) -> None:
    metrics = Metrics()

    async def handler(request: Request) -> Response:
        return PlainTextResponse("", status_code=status)

    await asked(metrics, "/api/show", handler)
    assert outcomes(metrics) == {("ollama", "/api/show", outcome): 1}


async def test_a_failure_told_inside_of_a_stream_is_one() -> None:
    metrics = Metrics()

    async def handler(request: Request) -> Response:
        note_failure(ModelNotFound("m"))
        return PlainTextResponse("{}")

    await asked(metrics, "/v1/models/a/b", handler)
    assert outcomes(metrics) == {("openai", "/v1/models/{model}", "MODEL_NOT_FOUND"): 1}


async def test_a_client_that_leaves_is_one() -> None:
    metrics = Metrics()

    async def handler(request: Request) -> Response:
        return PlainTextResponse("{}")

    with pytest.raises(asyncio.CancelledError):
        await asked(metrics, "/api/show", handler, hang_up=True)
    assert outcomes(metrics) == {("ollama", "/api/show", "cancelled"): 1}


async def test_what_callers_write_is_no_label() -> None:
    metrics = Metrics()

    async def handler(request: Request) -> Response:
        return PlainTextResponse("{}")

    for path in ("/v1/models/evil-1", "/v1/models/evil-2", "/evil-3", "/api/evil-4"):
        await asked(metrics, path, handler)
    assert outcomes(metrics) == {("openai", "/v1/models/{model}", "ok"): 2, ("none", "none", "http_404"): 2}
    assert b"evil" not in metrics.scrape().render("")[0]


@pytest.mark.parametrize(
    ("path", "api"),
    [
        ("/", "ollama"),
        ("/api/chat", "ollama"),
        ("/v1/chat/completions", "openai"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/v1/rerank", "llama_server"),
        ("/tokenize", "llama_server"),
        ("/metrics", "lmd"),
    ],
)
def test_a_path_tells_the_api(path: str, api: str) -> None:
    assert api_of(path) == api
