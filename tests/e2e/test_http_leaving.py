"""Clients that leave at every point of every route leave no task, slot, request of a runner, pull or socket behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import gguf
import psutil
import pytest

from lmd.daemon.http.counting import template_of
from tests.support.compatibility import routes
from tests.support.hub import HubServer
from tests.support.hub.faults import Stall
from tests.support.leaving import (
    BODIES,
    MODEL,
    RANKER,
    WAYS,
    Holdings,
    Visitor,
    holdings,
    metrics_of,
    nothing_left,
    places,
    request_of,
)
from tests.support.product import Product, installed, wait_until
from tests.support.shared_models import STORIES
from tests.support.tiny_models import CHATML, make_tiny_bert, make_tiny_llama

pytestmark = pytest.mark.e2e

ENDPOINTS = sorted(f"{verb} {template_of(route.path)}" for route in routes() for verb in route.methods or ())
STREAMS = (
    "POST /api/generate",
    "POST /api/chat",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "POST /v1/messages",
)
#: Those that ask the model of `Visitor`s for something.
MODEL_ROUTES = (
    *STREAMS,
    *("POST /api/embed", "POST /api/embeddings", "POST /v1/embeddings"),
    *("POST /tokenize", "POST /detokenize", "POST /apply-template", "POST /v1/messages/count_tokens"),
)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """A daemon with a model of one slot that answers for ever, one that ranks, and a Hub that stalls."""
    files = tmp_path_factory.mktemp("m")
    make_tiny_llama(files / f"{MODEL}.gguf", n_layer=8, n_embd=512, n_ctx=4096, chat_template=CHATML)
    make_tiny_bert(files / f"{RANKER}.gguf", pooling=gguf.PoolingType.RANK, classifier=True)
    home = tmp_path_factory.mktemp("h")
    # Descriptors are counted, and a spare runner takes some at its own time.
    settings = {"LMD_RUNTIME_SLOTS": "1", "LMD_RUNTIME_SPARE_RUNNER": "false"}
    with HubServer() as hub, installed(home, HF_ENDPOINT=hub.endpoint, **settings) as made:
        hub.add_repo("test/stalls", {STORIES.name: STORIES})
        hub.fault("test/stalls", STORIES.name, Stall(10_000), times=-1)
        made.start()
        for path in sorted(files.iterdir()):
            made.lm("pull", str(path))
        yield made


@pytest.fixture(scope="module")
def url(product: Product) -> str:
    return product.http_url


@pytest.fixture
def loaded(product: Product, url: str) -> None:
    """Both models are resident and stay, and everything that is made once is made."""
    for endpoint in ("POST /apply-template", "POST /rerank", "POST /api/embed"):
        visitor = Visitor(url).say(b"".join(request_of(endpoint, url, keep_alive=-1)))
        visitor.hear_the_beginning()
        visitor.leave()
    wait_until(lambda: quiet(holdings(url)), "nothing is under way")


def quiet(now: Holdings) -> bool:
    return not (now.requests or now.slots_busy or now.queued or now.pulls)


def test_every_route_that_takes_a_body_is_visited() -> None:
    bodiless = {"GET", "HEAD"}
    assert {endpoint for endpoint in ENDPOINTS if endpoint.split()[0] not in bodiless} == set(BODIES)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_clients_leave_at_every_point_of_a_request(product: Product, loaded: None, url: str, endpoint: str) -> None:
    head, body = request_of(endpoint, url)
    with nothing_left(product, url):
        for leave in WAYS:
            for said in places(head, body):
                leave(Visitor(url).say(said))
        # Many at once, and one that stays: it is seen, or the counts above would mean nothing.
        visitors = [Visitor(url).say(said) for said in places(head, body) for _ in range(3)]
        for visitor in visitors:
            visitor.slam()


def test_those_who_stay_are_seen(product: Product, loaded: None, url: str) -> None:
    with nothing_left(product, url) as before:
        visitors = [Visitor(url) for _ in range(3)]
        visitors += [Visitor(url).say(request_of("POST /api/show", url)[0]) for _ in range(3)]
        wait_until(lambda: holdings(url).descriptors >= before.descriptors + 6, "six connections are open")
        wait_until(lambda: holdings(url).requests == 3, "three requests wait for their bodies")
        assert holdings(url).tasks >= before.tasks + 3
        for visitor in visitors:
            visitor.leave()


@pytest.mark.parametrize("endpoint", STREAMS)
@pytest.mark.parametrize("leave", WAYS, ids=["leaves", "slams"])
def test_clients_leave_in_the_middle_of_a_stream(
    product: Product, loaded: None, url: str, endpoint: str, leave: Callable[[Visitor], None]
) -> None:
    with nothing_left(product, url) as before:
        visitor = Visitor(url).say(b"".join(request_of(endpoint, url)))
        visitor.hear_the_beginning()
        wait_until(lambda: holdings(url).slots_busy == 1, "the answer is under way")
        assert holdings(url).tasks > before.tasks
        leave(visitor)


@pytest.mark.parametrize("endpoint", STREAMS)
def test_clients_leave_before_an_answer_that_is_sent_whole(
    product: Product, loaded: None, url: str, endpoint: str
) -> None:
    with nothing_left(product, url):
        visitor = Visitor(url).say(b"".join(request_of(endpoint, url, stream=False)))
        wait_until(lambda: holdings(url).slots_busy == 1, "the answer is under way")
        visitor.leave()


@pytest.mark.parametrize("endpoint", STREAMS)
def test_clients_leave_the_queue(product: Product, loaded: None, url: str, endpoint: str) -> None:
    with nothing_left(product, url):
        first = Visitor(url).say(b"".join(request_of("POST /api/generate", url)))
        first.hear_the_beginning()
        waiting = [Visitor(url).say(b"".join(request_of(endpoint, url, stream=stream))) for stream in (True, False)]
        wait_until(lambda: holdings(url).queued == 2, "two wait for the slot")
        for leave, visitor in zip(WAYS, waiting, strict=True):
            leave(visitor)
        wait_until(lambda: holdings(url).queued == 0, "nobody waits for the slot")
        assert holdings(url).slots_busy == 1
        first.leave()


@pytest.mark.parametrize("endpoint", MODEL_ROUTES)
def test_clients_leave_while_the_model_is_loaded(product: Product, url: str, endpoint: str) -> None:
    product.lm("stop", MODEL, code=None)
    wait_until(lambda: quiet(holdings(url)) and not resident(url), "the model is gone")
    with nothing_left(product, url):
        visitor = Visitor(url).say(b"".join(request_of(endpoint, url)))
        wait_until(lambda: resident(url) == "loading", "the model is being loaded")
        # So that it stays so: what the daemon started last is the runner that loads.
        runner = max(psutil.Process(product.daemons[-1].pid).children(), key=psutil.Process.create_time)
        runner.suspend()
        try:
            wait_until(lambda: holdings(url).queued == 1, "the request waits for it")
            visitor.leave()
            # Whether the load goes on depends on how far it is.
            wait_until(lambda: holdings(url).queued == holdings(url).requests == 0, "nobody waits for it")
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                runner.resume()
        product.lm("stop", MODEL, code=None)


def test_clients_leave_a_pull(product: Product, url: str) -> None:
    with nothing_left(product, url):
        requests = [b"".join(request_of("POST /api/pull", url, stream=stream)) for stream in (True, False)]
        visitors = [Visitor(url).say(request) for request in requests]
        visitors[0].hear_the_beginning()
        wait_until(lambda: (metrics_of(url)("lmd_pull_received_bytes_total") or 0) >= 10_000, "bytes arrive")
        wait_until(lambda: holdings(url).pulls == 1, "both watch one pull")
        visitors[0].slam()
        wait_until(lambda: holdings(url).requests == 1, "one has left")
        assert holdings(url).pulls == 1
        visitors[1].leave()


def resident(url: str) -> str:
    """Return the state of the model; nothing when it is not resident."""
    states = metrics_of(url).labelled("lmd_model_state")
    return next((it["state"] for it, value in states if value and it["model"].startswith(MODEL)), "")
