"""Loads and unloads, one after the other: what the daemon keeps of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil

from bench.figures import Figure
from bench.meter import UsageMeter
from bench.residents import OurModels
from tests.support.shared_models import STORIES

RSS_LIMIT_MB = 2.0
#: A pool makes its threads as they are needed; what leaks would have one for each cycle.
THREADS_LIMIT = 2
_MODEL = "stories"
_WINDOW = 20


@dataclass(frozen=True, slots=True)
class Weight:
    """What the daemon holds when nothing is loaded."""

    rss_bytes: int
    descriptors: int
    threads: int
    children: int
    files: int


def cycles(count: int) -> tuple[list[Figure], dict[str, object]]:
    """Return how much more the daemon holds after *count* loads, each with an answer, and unloads.

    Weighed after each cycle. The beginning, in which caches fill, is the second tenth; the end is the last one.
    """
    meter = UsageMeter((), ())
    with OurModels({_MODEL: STORIES}, slots=1, num_ctx=512) as ours:
        daemon = psutil.Process(ours.pids[0])
        weights = []
        for _ in range(count):
            ours.load(_MODEL)
            ours.ask(_MODEL, "Once upon a time", 4)
            ours.unload(_MODEL)
            weights.append(_weigh(daemon, ours))
    others = meter.read().others
    window = min(_WINDOW, max(1, count // 10))
    early, late = weights[window : 2 * window], weights[-window:]
    rss = [value / 1e6 for value in _medians("rss_bytes", early, late)]
    figures = [
        Figure(
            "cycles",
            f"{count} loads and unloads: memory of the daemon",
            "MB",
            rss[1],
            rss[0],
            rss[1] - rss[0],
            "<=",
            RSS_LIMIT_MB,
            others,
        )
    ]
    for name, title, limit in (
        ("descriptors", "its file descriptors", 0),
        ("threads", "its threads", THREADS_LIMIT),
        ("children", "its processes", 0),
        ("files", "files in its home", 0),
    ):
        before, after = _medians(name, early, late)
        figures.append(Figure("cycles", title, "", after, before, after - before, "<=", limit, others))
    return figures, {"cycles": [asdict(weight) for weight in weights]}


def _weigh(daemon: psutil.Process, ours: OurModels) -> Weight:
    with daemon.oneshot():
        return Weight(
            daemon.memory_info().rss,
            daemon.num_fds(),
            daemon.num_threads(),
            len(daemon.children(recursive=True)),
            # Not `rglob`: folders go away while it looks.
            sum(len(files) for _, _, files in os.walk(ours.product.home)),
        )


def _medians(name: str, *windows: Sequence[Weight]) -> list[float]:
    return [statistics.median(getattr(weight, name) for weight in window) for window in windows]
