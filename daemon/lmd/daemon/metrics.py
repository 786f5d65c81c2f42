"""What the daemon counts and times, for Prometheus.

Requests are counted at the two doors, gRPC and HTTP, by `Metrics.request`; what a model did for them where both doors
meet, in `Inference` and `ModelCalls`. What can be looked up is not counted: it is read when somebody asks. The labels
are names out of this code, and the models that are resident; nothing that a caller makes up becomes a label.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from lmd.daemon.answer_meter import AnswerMeter
from lmd.daemon.outcomes import REASONS, Outcome, outcome_of_request
from lmd.daemon.resident_metrics import Holdings, families
from lmd.v1.version import API_VERSION, __version__

#: Seconds; from a cached prompt on an accelerator to a long one on a slow processor.
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
#: Seconds; from a list of models to a long answer or the pull of a large model.
DURATION_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
#: Seconds that a request waits for others.
WAIT_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Everything that is counted, in a registry of its own. Used from the event loop, except for `render`."""

    def __init__(self, *, engine_version: str = "") -> None:
        self.registry = registry = CollectorRegistry()
        #: Reads what can be looked up; the application sets it.
        self.look: Callable[[], Holdings] = Holdings
        self._requests = Counter(
            "lmd_requests",
            "Requests that have ended, by the API and route they came by and how they ended.",
            ["api", "route", "outcome"],
            registry=registry,
        )
        self._running = Gauge("lmd_requests_running", "Requests being served.", ["transport"], registry=registry)
        self._durations = Histogram(
            "lmd_request_duration_seconds",
            "From the arrival of a request to the end of its answer.",
            ["api", "route"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._errors = Counter("lmd_errors", "Requests that failed, by reason.", ["reason"], registry=registry)
        for reason in REASONS:
            self._errors.labels(reason)
        self.work = ModelWork(registry)
        ProcessCollector(registry=registry)
        build = Info("lmd_build", "Versions of the daemon and what it runs with; always 1.", registry=registry)
        build.info(
            {
                "version": __version__,
                "api_version": str(API_VERSION),
                "engine_version": engine_version,
                "python_version": platform.python_version(),
            }
        )

    @contextmanager
    def request(self, transport: str, api: str = "", route: str = "") -> Iterator[Request]:
        """Count and time the request that is served in the block; what it ends with is told or raised in it."""
        running = self._running.labels(transport)
        running.inc()
        began_s = time.perf_counter()
        request = None
        try:
            with outcome_of_request() as outcome:
                request = Request(outcome, api, route)
                yield request
        finally:
            running.dec()
            if request is not None:
                self._end(request, time.perf_counter() - began_s)

    def _end(self, request: Request, took_s: float) -> None:
        outcome = request.outcome.text
        self._requests.labels(request.api, request.route, outcome).inc()
        self._durations.labels(request.api, request.route).observe(took_s)
        if outcome in REASONS:
            self._errors.labels(outcome).inc()

    def scrape(self) -> Scrape:
        """Read what can be looked up, and return it with what was counted."""
        return Scrape(self.registry, self.look())


@dataclass(slots=True)
class Request:
    """A request at a door: which API's, the route's template, and how it ends."""

    outcome: Outcome
    api: str
    route: str


class ModelWork:
    """What models did: answers, and calls that have one reply."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str) -> Counter:
            return Counter(name, documentation, registry=registry)

        self._prompt = counter("lmd_prompt_tokens", "Tokens of prompts and of texts that were embedded.")
        self._cached = counter(
            "lmd_cached_prompt_tokens", "Tokens of prompts that were reused from a prefix cache instead of read."
        )
        self._generated = counter("lmd_generated_tokens", "Tokens of answers, also of those that were not finished.")
        self._drafted = counter("lmd_drafted_tokens", "Tokens that were guessed ahead of the model.")
        self._accepted = counter(
            "lmd_accepted_tokens", "Tokens that were guessed ahead of the model and that it agreed with."
        )
        lookups = Counter(
            "lmd_prefix_cache_lookups",
            "Prompts by whether the prefix cache had a part of them.",
            ["result"],
            registry=registry,
        )
        self._hits, self._misses = lookups.labels("hit"), lookups.labels("miss")
        self._first_token = Histogram(
            "lmd_time_to_first_token_seconds",
            "From the arrival of a request to the first of its answer, loading and waiting included.",
            ["operation"],
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._durations = Histogram(
            "lmd_work_duration_seconds",
            "From the arrival of a request to the end of what its model did for it; only of those that were finished.",
            ["operation"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._queue = Histogram(
            "lmd_queue_wait_seconds",
            "How long an answer waited for a slot of its runner.",
            buckets=WAIT_BUCKETS,
            registry=registry,
        )
        self._load = Histogram(
            "lmd_load_wait_seconds",
            "How long a request waited until its model was ready; only of those that had to.",
            buckets=WAIT_BUCKETS,
            registry=registry,
        )

    def answer(self, operation: str) -> AnswerMeter:
        """Return what measures one answer; a context manager around it."""
        return AnswerMeter(self, operation)

    def note_first_token(self, operation: str, after_ns: int) -> None:
        """Note when the first of an answer was there."""
        self._first_token.labels(operation).observe(after_ns / 1e9)

    def note_prompt(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Note that a runner took a prompt, and how much of it was there already."""
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)
        (self._hits if cached_tokens else self._misses).inc()

    def note_generated(self, tokens: int, *, drafted: int = 0, accepted: int = 0) -> None:
        """Note the tokens of an answer."""
        self._generated.inc(tokens)
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)

    def note_finished(self, operation: str, *, total_ns: int, load_ns: int, queue_ns: int | None = None) -> None:
        """Note how long something took that was finished; None for *queue_ns* where there is no queue for slots."""
        self._durations.labels(operation).observe(total_ns / 1e9)
        if load_ns:
            self._load.observe(load_ns / 1e9)
        if queue_ns is not None:
            self._queue.observe(queue_ns / 1e9)

    def note_call(self, operation: str, *, total_ns: int, load_ns: int, embedded_tokens: int) -> None:
        """Note a call that has one reply."""
        self._prompt.inc(embedded_tokens)
        self.note_finished(operation, total_ns=total_ns, load_ns=load_ns)


class Scrape:
    """All values at one moment; `render` may run in any thread."""

    def __init__(self, registry: CollectorRegistry, holdings: Holdings) -> None:
        self._registry = registry
        self._holdings = holdings

    def collect(self) -> Iterator[Metric]:
        """Yield every family, as prometheus-client wants it."""
        yield from self._registry.collect()
        yield from families(self._holdings)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the text in the format that *accept*, an HTTP header, asks for, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self), media_type
