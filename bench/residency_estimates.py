"""What headers say that models take, against what the engine takes: `bench.memory_estimates` in figures."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from bench.figures import Figure
from bench.meter import UsageMeter

_MB = 1e6
_EXACT = ("weights", "kv")


def estimates(*, quick: bool) -> tuple[list[Figure], dict[str, object]]:
    """Load generated models of all kinds and return how far their estimates are off.

    In a process of its own: it loads the engine, and leaves nothing of it in the one that measures.
    """
    meter = UsageMeter((), ())
    command = [sys.executable, "-m", "bench.memory_estimates", "--json", *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}")
    rows = json.loads(done.stdout)
    others = meter.read().others
    off = sum(not row["ok"] for row in rows)
    exact = max(100 * abs(_error(row, what)) / max(row["measured"][what], 1) for row in rows for what in _EXACT)
    worst = max(rows, key=lambda row: abs(_error(row, "total")))
    sizes = worst["estimated"]["total"] / _MB, worst["measured"]["total"] / _MB

    def figure(title: str, unit: str, ours: float, theirs: float | None, value: float, kind: str) -> Figure:
        return Figure("estimates", title, unit, ours, theirs, value, kind, 0, others)

    models = len({row["model"] for row in rows})
    return [
        figure(f"{len(rows)} loads of {models} kinds of models: estimates that are off", "", off, None, off, "<="),
        figure("worst estimate of weights or KV", "%", exact, None, exact, ""),
        figure(f"worst estimate of all together, of {worst['model']}", "MB", *sizes, sizes[0] - sizes[1], ""),
    ], {"estimates": rows}


def _error(row: dict[str, Any], what: str) -> int:
    return int(row["estimated"][what] - row["measured"][what])
