"""What the daemon holds at one moment, as Prometheus wants it: resident models, their caches and queues, and pulls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from lmd.daemon.pull_job import State
from lmd.daemon.residency.values import RunnerState, RunnerStatus
from lmd.daemon.runner_stats import EngineStats


@dataclass(frozen=True, slots=True)
class Holdings:
    """What is there now.

    Attributes:
        runners: resident models, those that load, leave or have failed a moment ago included.
        pulls_running: pulls under way.
        pulls_ended: how many ended how, since the start.
        pull_received_bytes: bytes that pulls received since the start.
        tasks: tasks of the event loop.
    """

    runners: Sequence[RunnerStatus] = ()
    pulls_running: int = 0
    pulls_ended: Mapping[State, int] = field(default_factory=dict)
    pull_received_bytes: int = 0
    tasks: int = 0


#: Two manifests can be resident under one name, the older one until its answers are done.
_LABELS = ("model", "digest")

_GAUGES: tuple[tuple[str, str, Callable[[RunnerStatus], float]], ...] = (
    ("memory_bytes", "Memory that the model takes, on all devices.", lambda runner: runner.memory_bytes),
    ("vram_bytes", "Memory that the model takes on accelerators.", lambda runner: runner.vram_bytes),
    ("context_tokens", "Tokens that one request's context can hold.", lambda runner: runner.context_length),
    ("slots", "Answers that can be made at once.", lambda runner: runner.slots),
    ("slots_busy", "Answers being made.", lambda runner: runner.slots_busy),
    ("queue_length", "Requests that wait, for the model or for a slot.", lambda runner: runner.queued),
)
_ENGINE_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("kv_used_tokens", "Tokens that the KV cache holds, of running requests and of prefixes.", lambda s: s.kv_used),
    ("kv_size_tokens", "Tokens that the KV cache can hold.", lambda s: s.kv_size),
    ("prefixes", "Prefixes that the cache keeps.", lambda s: s.prefixes),
    ("parked_bytes", "Memory of prefixes that wait outside of the KV cache.", lambda s: s.parked_bytes),
)
_ENGINE_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("prompt_tokens", "Tokens of prompts since the model was loaded.", lambda s: s.prompt_tokens),
    (
        "cached_prompt_tokens",
        "Tokens of prompts that were reused from the prefix cache, since the model was loaded.",
        lambda s: s.cached_tokens,
    ),
    ("generated_tokens", "Tokens generated since the model was loaded.", lambda s: s.generated_tokens),
    ("drafted_tokens", "Tokens guessed since the model was loaded.", lambda s: s.drafted_tokens),
    ("accepted_tokens", "Guessed tokens that the model agreed with, since it was loaded.", lambda s: s.accepted_tokens),
    ("prefix_cache_hits", "Prompts of which the prefix cache had a part.", lambda s: s.cache_hits),
    ("prefix_cache_misses", "Prompts of which the prefix cache had nothing.", lambda s: s.cache_misses),
)


def families(holdings: Holdings) -> Iterator[Metric]:
    """Yield a family for each kind of value; also those of which there is none now, so that all are known."""
    yield from _models(holdings.runners)
    yield GaugeMetricFamily("lmd_pulls_running", "Pulls under way.", value=holdings.pulls_running)
    ended = CounterMetricFamily("lmd_pulls", "Pulls that have ended, by how.", labels=["outcome"])
    for state in State:
        if state is not State.ACTIVE:
            ended.add_metric([state.value], holdings.pulls_ended.get(state, 0))
    yield ended
    yield CounterMetricFamily(
        "lmd_pull_received_bytes", "Bytes that pulls received.", value=holdings.pull_received_bytes
    )
    yield GaugeMetricFamily("lmd_tasks", "Tasks of the daemon's event loop.", value=holdings.tasks)


def _models(runners: Sequence[RunnerStatus]) -> Iterator[Metric]:
    labels = [[runner.name, runner.digest.short] for runner in runners]
    state = GaugeMetricFamily("lmd_model_state", "1 for the state a resident model is in.", labels=[*_LABELS, "state"])
    for runner, values in zip(runners, labels, strict=True):
        for known in RunnerState:
            state.add_metric([*values, known.value], float(runner.state is known))
    yield state
    for name, documentation, read in _GAUGES:
        gauge = GaugeMetricFamily(f"lmd_model_{name}", documentation, labels=_LABELS)
        for runner, values in zip(runners, labels, strict=True):
            gauge.add_metric(values, read(runner))
        yield gauge
    engines = [(runner.stats, values) for runner, values in zip(runners, labels, strict=True) if runner.stats]
    for name, documentation, read_stats in _ENGINE_GAUGES:
        gauge = GaugeMetricFamily(f"lmd_model_{name}", documentation, labels=_LABELS)
        for stats, values in engines:
            gauge.add_metric(values, read_stats(stats))
        yield gauge
    for name, documentation, read_stats in _ENGINE_COUNTERS:
        counter = CounterMetricFamily(f"lmd_model_{name}", documentation, labels=_LABELS)
        for stats, values in engines:
            counter.add_metric(values, read_stats(stats))
        yield counter
