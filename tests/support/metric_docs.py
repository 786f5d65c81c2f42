"""Keeps the table in docs/reference/metrics.md that of the program.

`python -m tests.support.metric_docs` writes it; a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from prometheus_client.metrics_core import Metric

from lmd.daemon.metrics import Metrics
from lmd.daemon.resident_metrics import Holdings
from lmd.daemon.runner_stats import EngineStats
from tests.support.runner_statuses import runner_status

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "metrics.md"

_BLOCK = re.compile(r"<!-- metrics: (?P<part>\w+) -->\n.*?<!-- end -->", re.DOTALL)
#: What stands in which table; the first beginning that fits.
_PARTS = (
    ("lmd_model_", "models"),
    ("lmd_request", "requests"),
    ("lmd_errors", "requests"),
    ("lmd_pull", "daemon"),
    ("lmd_tasks", "daemon"),
    ("lmd_build", "daemon"),
    ("process_", "daemon"),
    ("lmd_", "work"),
)


def exercised() -> Metrics:
    """Return metrics in which everything has happened once, so that every label shows."""
    metrics = Metrics()
    with metrics.request("grpc", "grpc", "SystemService/GetStatus"):
        pass
    metrics.work.note_first_token("chat", 1)
    metrics.work.note_finished("chat", total_ns=1, load_ns=1, queue_ns=1)
    stats = EngineStats(**{field.name: 0 for field in fields(EngineStats)})
    runner = runner_status(stats=stats)
    metrics.look = lambda: Holdings(runners=[runner])
    return metrics


def lines(metrics: Metrics, part: str) -> Iterator[str]:
    """Yield the lines of a table: the name that queries use, the kind, the labels, and what it means."""
    for family in sorted(metrics.scrape().collect(), key=lambda family: family.name):
        if _part_of(family.name) == part:
            labels = ", ".join(f"`{label}`" for label in _labels(family))
            yield f"| `{_name(family)}` | {family.type} | {labels} | {family.documentation} |"


def updated(page: str) -> str:
    """Return *page* with the current tables."""
    metrics = exercised()

    def block(found: re.Match[str]) -> str:
        table = ["| name | kind | labels | meaning |", "|---|---|---|---|", *lines(metrics, found["part"])]
        return f"<!-- metrics: {found['part']} -->\n" + "\n".join(table) + "\n<!-- end -->"

    return _BLOCK.sub(block, page)


def _part_of(name: str) -> str:
    return next(part for beginning, part in _PARTS if name.startswith(beginning))


def _name(family: Metric) -> str:
    suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
    return family.name if family.name.endswith(suffix) else family.name + suffix


def _labels(family: Metric) -> list[str]:
    found = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
    return list(found)


def main() -> None:
    """Write the page."""
    PAGE.write_text(updated(PAGE.read_text()))


if __name__ == "__main__":
    main()
