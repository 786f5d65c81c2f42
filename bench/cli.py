"""Start-up of `lm`, as ratios to what it cannot do without.

    lm --help   to   python -c "import click"    under 1.5
    lm ls       to   python -c "import grpc"     under 2.5, with a running daemon

Each pair is measured alternately in one run, and the fastest of many is taken, so that other load on the machine
changes both sides alike. `lm ls` talks to the tests' stand-in, whose answer takes no time worth speaking of; with
`--socket` it talks to a real daemon.

    python -m bench.cli [--rounds 20] [--socket PATH]
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.cli import command, environment
from tests.support.fake_daemon import FakeDaemon

_LIMITS = {"lm --help": 1.5, "lm ls": 2.5}


def _seconds(args: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(args, stdout=subprocess.DEVNULL, check=True, env=environment())
    return time.perf_counter() - started


def _fastest(first: list[str], second: list[str], rounds: int) -> tuple[float, float]:
    pairs = [(_seconds(first), _seconds(second)) for _ in range(rounds)]
    return min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)


@contextlib.contextmanager
def _daemon(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as directory, FakeDaemon(Path(directory) / "lmd.sock") as daemon:
        for number in range(10):
            daemon.add(f"model-{number}:latest")
        yield daemon.socket


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--socket", type=Path)
    options = parser.parse_args()
    with _daemon(options.socket) as socket:
        pairs = {
            "lm --help": (command("--help"), "import click"),
            "lm ls": (command("--socket", str(socket), "ls"), "import grpc"),
        }
        too_slow = False
        for name, (lm, statement) in pairs.items():
            ours, floor = _fastest(lm, [sys.executable, "-c", statement], options.rounds)
            ratio = ours / floor
            too_slow |= ratio >= _LIMITS[name]
            print(
                f"{name:<10} {ours * 1000:6.1f} ms   python -c '{statement}' {floor * 1000:6.1f} ms   "
                f"ratio {ratio:.2f} (limit {_LIMITS[name]})"
            )
    sys.exit(too_slow)


if __name__ == "__main__":
    main()
