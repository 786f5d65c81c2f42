"""What a header says a model will take against what the engine takes: kinds of models, types of KV, contexts.

Bars: weights and KV within 1 %, all together within 3 % and 32 MB. Bytes do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from lmd.registry.memory import kv_type_problem
from tests.support.memory_estimates import Row, compare, read
from tests.support.shaped_models import SHAPES

KV_TYPES = ("f16", "q8_0")
CONTEXTS = (1024, 4096, 16384)
SLOTS = 2
_MB = 1e6


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
                    rows.append(compare(name, path, num_ctx=num_ctx, kv_type=kv_type, slots=SLOTS))
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
