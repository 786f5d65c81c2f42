"""What making models costs: from a stored model, and from a file on the same disk.

    python -m bench.create                                    # all cases
    python -m bench.create --cases derived --size-mb 100      # one, with a smaller file

- *derived*: `lm create` of a model that has another system prompt than the stored one it is made from. The whole
  command is timed, the start of its Python included.
- *file*: `lm create` from a GGUF file that nobody may write to, on the store's file system. What the daemon and the
  command read and write is counted by the kernel (`/proc/PID/io`), whether it comes from the disk or from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.gguf_file import write_gguf
from tests.support.product import Daemon, Product, command, installed

DERIVED_LIMIT_S = 0.3
#: One read of the file, its header once more, and 6 MB of Python.
READ_LIMIT = 1.05
#: What a file that is shared costs beside: the manifest, the index, the journal.
WRITE_LIMIT = 0.05

Figures = dict[str, object]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a process has read and written with system calls."""

    read_bytes: int
    written_bytes: int


def traffic(pid: int) -> Traffic:
    """Return what a process has read and written so far; also of one that has ended and was not waited for."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return Traffic(int(fields["rchar"]), int(fields["wchar"]))


def counted(product: Product, *args: str) -> Traffic:
    """Run `lm` and return what it read and wrote."""
    process = subprocess.Popen(
        [command("lm"), "--no-start", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=product.environment(),
    )
    # The kernel forgets the counts when the process is reaped.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seen = traffic(process.pid)
    if process.wait():
        raise RuntimeError(f"lm {' '.join(args)} failed")
    return seen


@contextlib.contextmanager
def daemon_on(directory: Path) -> Iterator[tuple[Product, Daemon]]:
    """Run a daemon on a private home in *directory*."""
    home = directory / "home"
    home.mkdir()
    with installed(home) as product:
        yield product, product.start()


def derived(directory: Path, options: argparse.Namespace) -> Figures:
    """Return the seconds that `lm create` from a stored model takes."""
    base = directory / "base.gguf"
    write_gguf(base, options.size_mb * 1_000_000, block=os.urandom(1 << 20))
    seconds = []
    with daemon_on(directory) as (product, _):
        product.lm("pull", str(base), timeout_s=600)
        for number in range(options.rounds):
            recipe = f'FROM base\nSYSTEM "You are number {number}."\nPARAMETER temperature 0.{number % 10}\n'
            started = time.perf_counter()
            product.lm("create", "derived", "-f", "-", stdin=recipe)
            seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {"seconds": median, "all_seconds": seconds, "bar": DERIVED_LIMIT_S, "met": median <= DERIVED_LIMIT_S}


def from_file(directory: Path, options: argparse.Namespace) -> Figures:
    """Return how often `lm create` from a local file reads it, and how much of it is written anew."""
    weights = directory / "weights.gguf"
    write_gguf(weights, options.size_mb * 1_000_000, block=os.urandom(1 << 20))
    weights.chmod(0o444)
    # The first round has the digest to find out, the second only to look it up.
    figures: Figures = {}
    with daemon_on(directory) as (product, daemon):
        recipe = directory / "Modelfile"
        recipe.write_text("FROM ./weights.gguf\n")
        for name in ("first", "again"):
            before = traffic(daemon.pid)
            started = time.perf_counter()
            client = counted(product, "create", name, "-f", str(recipe))
            seconds = time.perf_counter() - started
            after = traffic(daemon.pid)
            size_bytes = weights.stat().st_size
            figures[name] = {
                "seconds": seconds,
                "reads": (after.read_bytes - before.read_bytes + client.read_bytes) / size_bytes,
                "copies": (after.written_bytes - before.written_bytes + client.written_bytes) / size_bytes,
            }
    first = figures["first"]
    assert isinstance(first, dict)
    figures["bar"] = f"{READ_LIMIT} reads, {WRITE_LIMIT} copies"
    figures["met"] = first["reads"] <= READ_LIMIT and first["copies"] <= WRITE_LIMIT
    return figures


CASES: Mapping[str, Callable[[Path, argparse.Namespace], Figures]] = {
    "derived": derived,
    "file": from_file,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="some of %(default)s, with commas between them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mb", type=int, default=500, help="size of the files, in millions of bytes")
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default is the temporary directory")
    parser.add_argument("--json", type=Path, default=None, help="write every figure to this file")
    options = parser.parse_args()
    figures: dict[str, Figures] = {}
    for name in options.cases.split(","):
        with tempfile.TemporaryDirectory(prefix="lm-bench-", dir=options.dir) as directory:
            figures[name] = CASES[name](Path(directory), options)
        print(f"{name}: {json.dumps(figures[name])}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(not all(case["met"] for case in figures.values()))


if __name__ == "__main__":
    main()
