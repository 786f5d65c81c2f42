"""Compares what a header says a model will take with what the engine takes, and holds the error against the bars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmd.registry.gguf import GgufHeader, read_header
from lmd.registry.memory import MemoryEstimate, estimate
from tests.support.loaded_memory import Loaded, measure

EXACT_SHARE = 0.01
TOTAL_SHARE = 0.03
TOTAL_BYTES = 32_000_000
# The engine prints sizes in MiB with two decimals.
_PRINTED_BYTES = 3 * 10_486


@dataclass(frozen=True, slots=True)
class Row:
    """One load."""

    model: str
    kv_type: str
    num_ctx: int
    estimated: dict[str, int]
    measured: dict[str, int]

    def share(self, what: str) -> float:
        """Return the error as a share of what was measured."""
        return self.error_bytes(what) / max(self.measured[what], 1)

    def error_bytes(self, what: str) -> int:
        """Return how much too large the estimate is."""
        return self.estimated[what] - self.measured[what]

    @property
    def ok(self) -> bool:
        """Whether it is within the bars."""
        exact = all(
            abs(self.error_bytes(what)) <= EXACT_SHARE * self.measured[what] + _PRINTED_BYTES
            for what in ("weights", "kv")
        )
        return exact and abs(self.error_bytes("total")) <= TOTAL_SHARE * self.measured["total"] + TOTAL_BYTES


def read(path: Path) -> GgufHeader:
    """Return a file's header."""
    with path.open("rb") as file:
        return read_header(file, path.stat().st_size)


def compare(name: str, path: Path, *, num_ctx: int, kv_type: str, slots: int) -> Row:
    """Estimate and load."""
    return Row(
        model=name,
        kv_type=kv_type,
        num_ctx=num_ctx,
        estimated=_parts(estimate(read(path), num_ctx=num_ctx, slots=slots, kv_type=kv_type)),
        measured=_parts(measure(path, num_ctx=num_ctx, slots=slots, kv_type=kv_type)),
    )


def _parts(found: MemoryEstimate | Loaded) -> dict[str, int]:
    return {
        "weights": found.weights_bytes,
        "kv": found.kv_bytes,
        "compute": found.compute_bytes,
        "total": found.total_bytes,
    }
