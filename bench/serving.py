"""The daemon beside llama-server: the same engine, model, context and clients, in turns.

    tools/build_llama_server.sh
    python -m bench.serving [--cases one,shared,…] [--rounds 5] [--quick] [--json FILE]

Both servers are up at the same time and only one works: each round asks first one, then the other, and the next round
the other way round, with prompts that neither has seen. A figure is the ratio of the medians. Prompts are texts of
words that are one token each, and both servers must count the same. What was disturbed by something else on the
machine is measured once more, and said when it stays so. A table goes to standard output, everything that
was measured to *FILE*. Exit status 1 says that a bar was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import engine_limits
from bench.answers import Server
from bench.llama_server import LlamaServer
from bench.meter import UsageMeter, machine, settle, wait_for_quiet
from bench.models import benchmark_model, cache_directory
from bench.our_server import OurServer
from bench.restart import restart
from bench.serving_cases import CASES, Case, Setting
from bench.serving_report import NOISY_CORES, CaseResult, Sample, table

_EXTRA = ("restart", "limits")
_ATTEMPTS = 2


def main() -> None:
    options = _options()
    # Stopped from outside, it still ends the servers it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = _chosen(options.cases)
    model = options.model or benchmark_model()
    settings = dict(pair.split("=", 1) for pair in options.daemon)
    result: dict[str, Any] = {"machine": machine(), "model": model.name, "rounds": options.rounds}
    if "limits" in names:
        repetitions = min(3, options.rounds)
        wait_for_quiet(NOISY_CORES, options.patience)
        result["limits"] = engine_limits.limits(
            options.programs, model, threads=options.threads, repetitions=repetitions
        )
    results: list[CaseResult] = []
    chosen = [case for case in CASES if case.name in names]
    for setting in dict.fromkeys(case.setting for case in chosen):
        with _servers(setting, model, options, settings) as (pair, facts):
            result.setdefault("servers", []).append({**asdict(setting), **facts})
            for case in (case for case in chosen if case.setting == setting):
                results.append(_run(case, pair, min(case.rounds or options.rounds, options.rounds), options.patience))
                print(f"{case.name}: {results[-1].line()}", file=sys.stderr)
    if "restart" in names:
        result["restart"] = restart(model, rounds=options.rounds, threads=options.threads, settings=settings)
    result["cases"] = [measured.to_json() for measured in results]
    result["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(results, result))
    missed = any(not met for measured in results for *_, met in measured.rows())
    sys.exit(missed or not result.get("restart", {}).get("met", True))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*(case.name for case in CASES), *_EXTRA])
    parser.add_argument("--cases", help=f"names or beginnings of names, with commas between: {names}; default: all")
    parser.add_argument("--rounds", type=int, help="how often each side is measured; default: 5")
    parser.add_argument("--quick", action="store_true", help="2 rounds, to see that all works")
    parser.add_argument("--threads", type=int, default=0, help="for both; default: what each chooses by itself")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for the machine to be quiet")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model", type=Path, help="another GGUF that never ends by itself")
    parser.add_argument("--programs", type=Path, help="where llama-server is; default: where the build script puts it")
    parser.add_argument("--daemon", action="append", default=[], metavar="NAME=VALUE", help="a variable of lmd")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="OPTION", help="another argument of llama-server"
    )
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    if options.programs is None:
        found = sorted(cache_directory().glob("llama.cpp-*/bin"))
        options.programs = found[-1] if found else cache_directory()
    if not (options.programs / "llama-server").exists():
        parser.error(f"no llama-server in {options.programs}; build it: tools/build_llama_server.sh")
    return options


def _chosen(given: str | None) -> list[str]:
    known = [*(case.name for case in CASES), *_EXTRA]
    if given is None:
        return known
    wanted = given.split(",")
    if unknown := [name for name in wanted if not any(other.startswith(name) for other in known)]:
        raise SystemExit(f"error: no such case: {', '.join(unknown)} (there are {', '.join(known)})")
    return [name for name in known if any(name.startswith(beginning) for beginning in wanted)]


@contextlib.contextmanager
def _servers(
    setting: Setting, model: Path, options: argparse.Namespace, settings: dict[str, str]
) -> Iterator[tuple[tuple[Server, Server], dict[str, object]]]:
    """Yield both servers, loaded, warm and idle, and what they say about themselves."""
    both = {"slots": setting.slots, "num_ctx": setting.num_ctx, "threads": options.threads}
    program = options.programs / "llama-server"
    with (
        OurServer(model, **both, settings=settings) as ours,
        LlamaServer(program, model, **both, options=tuple(options.peer)) as theirs,
    ):
        for server in (ours, theirs):
            server.ask("once upon a time", 8)
        settle([*ours.pids, *theirs.pids])
        yield (ours, theirs), {"theirs_threads": theirs.threads}


def _run(case: Case, pair: Sequence[Server], rounds: int, patience_s: float) -> CaseResult:
    result = CaseResult(case)
    for number in range(rounds):
        for server in pair if number % 2 == 0 else reversed(pair):
            (other,) = (candidate for candidate in pair if candidate is not server)
            for attempt in range(_ATTEMPTS):
                settle(other.pids)
                wait_for_quiet(NOISY_CORES, patience_s)
                meter = UsageMeter(server.pids, other.pids)
                # New prompts for every attempt: what was read before is no measure of reading.
                figures = case.measure(server, number * _ATTEMPTS + attempt)
                sample = Sample(dict(figures), meter.read())
                if not sample.disturbed(case):
                    break
            result.add(server.name, sample)
    return result


if __name__ == "__main__":
    main()
