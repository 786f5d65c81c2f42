"""Residency: estimates, swaps beside llama-server's router, scarce memory, leaks, and the planner's speed.

    tools/build_llama_server.sh
    python -m bench.residency [--cases swap,mixed] [--rounds 5] [--quick] [--json FILE]

- `estimates`: what headers say against what the engine takes, over generated models of all kinds
  (`bench.memory_estimates`).
- `swap`: two models where one fits, asked for in turns, ours and llama-server's router (`--models-max 1`) one after the
  other. The figure is the ratio of the medians of the time to the first token.
- `mixed`: three models where two fit, six clients that ask for any of them for five minutes. Errors, answers that were
  killed, the longest wait beside the fair share, and loads per request beside plain LRU on the same arrivals.
  `--with-router` lets the same clients ask llama-server's router too.
- `cycles`: 200 loads and unloads; memory, descriptors, threads and processes of the daemon, and files in its home.
- `planner`: 1,000 plans over 50 models and 8 devices (`bench.planner`).

What memory there is for models is set by `runtime.memory_reserve_bytes`: it is computed from what is free when the
daemon starts, checked by filling it, and said in the JSON. Programs that take or give back half a model's memory
meanwhile make the figures void, and requests fail. Where that cannot be helped, `--steady` lets the daemon believe that
the machine is so small and runs nothing else; all but its reading of the memory is as ever. Exit status 1 says that a
bar was missed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import planner
from bench.figures import Figure, table
from bench.meter import UsageMeter, machine
from bench.models import cache_directory
from bench.residency_cycles import cycles
from bench.residency_estimates import estimates
from bench.residency_mixed import mixed
from bench.residency_swap import swap

Measured = tuple[list[Figure], dict[str, object]]

_MIXED_S, _QUICK_MIXED_S = 300.0, 30.0
_CYCLES, _QUICK_CYCLES = 200, 20
_PLANS = 1000


def main() -> None:
    options = _options()
    # Stopped from outside, it still ends the servers it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    program = options.programs / "llama-server"
    cases: dict[str, Callable[[], Measured]] = {
        "estimates": lambda: estimates(quick=options.quick),
        "swap": lambda: swap(
            program, options.rounds, options.num_ctx, steady=options.steady, patience_s=options.patience
        ),
        "mixed": lambda: mixed(
            program, options.duration, options.num_ctx, steady=options.steady, with_router=options.with_router
        ),
        "cycles": lambda: cycles(options.cycles),
        "planner": planner_speed,
    }
    figures: list[Figure] = []
    whole: dict[str, Any] = {"machine": machine(), "rounds": options.rounds}
    for name in options.cases:
        measured, facts = cases[name]()
        figures += measured
        whole |= facts
        print(f"{name}: done", file=sys.stderr)
    whole["figures"] = [{**asdict(figure), "met": figure.met} for figure in figures]
    if options.json:
        options.json.write_text(json.dumps(whole, indent=2) + "\n")
    print(table(figures))
    busy = max(figure.others_cores for figure in figures)
    print(f"\nEverything else on the machine used up to {busy:.2f} cores, clients included where they ran beside.")
    sys.exit(any(not figure.met for figure in figures))


def planner_speed() -> Measured:
    """Return how long a thousand plans take; the best of three runs, as others can only slow them down."""
    meter = UsageMeter((), ())
    speed = min((planner.measure(_PLANS) for _ in range(3)), key=lambda speed: speed.total_s)
    title = f"{_PLANS:,} plans over {planner.MODELS} models and 8 devices"
    figure = Figure(
        "planner", title, "s", speed.total_s, None, speed.total_s, "<=", planner.LIMIT_S, meter.read().others
    )
    return [figure], {"planner": asdict(speed)}


CASES = ("estimates", "swap", "mixed", "cycles", "planner")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="with commas between; default: all")
    parser.add_argument("--rounds", type=int, help="how often each side is asked for each model in swap; default: 5")
    parser.add_argument("--duration", type=float, metavar="SECONDS", help=f"of mixed; default: {_MIXED_S:g}")
    parser.add_argument("--cycles", type=int, metavar="COUNT", help=f"default: {_CYCLES}")
    parser.add_argument("--with-router", action="store_true", help="mixed: llama-server's router too")
    parser.add_argument(
        "--num-ctx",
        type=int,
        default=2048,
        metavar="TOKENS",
        help="context for each of 4 slots, in swap and mixed; default: 2048. With more, models are larger, and it "
        "matters less what else happens to the machine's memory",
    )
    parser.add_argument("--steady", action="store_true", help="keep from the daemon what others do to memory")
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds to wait for the machine to be quiet, in swap"
    )
    parser.add_argument("--quick", action="store_true", help="little of all, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--programs", type=Path, help="where llama-server is; default: where the build script puts it")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.duration = options.duration or (_QUICK_MIXED_S if options.quick else _MIXED_S)
    options.cycles = options.cycles or (_QUICK_CYCLES if options.quick else _CYCLES)
    options.cases = options.cases.split(",")
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)} (there are {', '.join(CASES)})")
    if options.programs is None:
        found = sorted(cache_directory().glob("llama.cpp-*/bin"))
        options.programs = found[-1] if found else cache_directory()
    needs_peer = "swap" in options.cases or options.with_router
    if needs_peer and not (options.programs / "llama-server").exists():
        parser.error(f"no llama-server in {options.programs}; build it: tools/build_llama_server.sh")
    return options


if __name__ == "__main__":
    main()
