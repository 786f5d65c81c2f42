"""What a header says a model will take against what the engine takes: kinds of models, types of KV, contexts.

Bars: weights and KV within 1 %, all together within 3 % and 32 MB. Bytes do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from lmd.registry.gguf import GgufHeader, read_header
from lmd.registry.memory import MemoryEstimate, estimate, kv_type_problem
from tests.support.loaded_memory import Loaded, measure
from tests.support.shaped_models import SHAPES

EXACT_SHARE = 0.01
TOTAL_SHARE = 0.03
TOTAL_BYTES = 32_000_000
# The engine prints sizes in MiB with two decimals.
_PRINTED_BYTES = 3 * 10_486

KV_TYPES = ("f16", "q8_0")
CONTEXTS = (1024, 4096, 16384)
SLOTS = 2
_MB = 1e6


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


def compare(name: str, path: Path, *, num_ctx: int, kv_type: str, slots: int = SLOTS) -> Row:
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


def _line(row: Row) -> str:
    shares = " ".join(f"{100 * row.share(what):7.2f}" for what in ("weights", "kv"))
    sizes = " ".join(
        f"{row.estimated[what] / _MB:9.1f} {row.measured[what] / _MB:9.1f}" for what in ("weights", "kv", "compute")
    )
    total = f"{100 * row.share('total'):7.2f} {row.error_bytes('total') / _MB:8.1f}"
    return f"{row.model:16} {row.kv_type:5} {row.num_ctx:6} {sizes} {shares} {total}  {'ok' if row.ok else 'OFF'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one context and f16 alone")
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES), metavar="MODEL")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kv_types, contexts = (KV_TYPES[:1], CONTEXTS[1:2]) if options.quick else (KV_TYPES, CONTEXTS)
    rows: list[Row] = []
    if not options.json:
        print(f"estimated and measured, MB (10^6 bytes), {SLOTS} slots; errors in % of what was measured")
        columns = "".join(f"{what:>10}{'real':>10}" for what in ("weights", "kv", "compute"))
        print(f"{'model':16} {'KV':5} {'ctx':>6}{columns} {'w %':>7} {'kv %':>7} {'all %':>7} {'all MB':>8}")
    with tempfile.TemporaryDirectory(prefix="lm-bench-") as scratch:
        for name in options.models:
            path = SHAPES[name]().write(Path(scratch) / f"{name}.gguf")
            for kv_type in kv_types:
                if problem := kv_type_problem(read(path), kv_type):
                    print(f"{name}: no {kv_type}: {problem}", file=sys.stderr)
                    continue
                for num_ctx in contexts:
                    rows.append(compare(name, path, num_ctx=num_ctx, kv_type=kv_type))
                    if not options.json:
                        print(_line(rows[-1]), flush=True)
            path.unlink()
    if options.json:
        print(json.dumps([{**asdict(row), "ok": row.ok} for row in rows]))
    else:
        print(f"{sum(row.ok for row in rows)} of {len(rows)} loads of {len(options.models)} models within the bars")
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
