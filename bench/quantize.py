"""Quantizing, against llama.cpp's `llama-quantize` on the same input with the same threads.

    lm quantize NAME Q4_K_M   to   llama-quantize IN OUT Q4_K_M    at least 0.95 of its speed

Ours is the whole of what a user waits for: the command, the child process, hash, fsync, the check of the result, and
the new name. The peer's output is synced as well, since what is not on the disk is not done. Both are measured
alternately, each first in every other round, and the medians count. The bytes of both must be the same. The seconds of
processor time of each say what is work and what is waiting; of ours they are those of the daemon and its children.

    python -m bench.quantize [--quick] [--rounds 5] [--type Q4_K_M] [--file F16.gguf]

Without --file it is a model of 0.4 B of noise in F16, 0.8 GB. `llama-quantize` is built by
tools/build_llama_server.sh, or lies in the cache from an earlier run.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

from bench.models import cache_directory, plain_model
from tests.support.product import Product, installed
from tests.support.tiny_models import make_tiny_llama

_LIMIT = 0.95


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds that one run took, and those of processor time in it."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """The rounds of both."""

    ours: list[Round]
    peer: list[Round]
    same_bytes: bool

    @property
    def ratio(self) -> float:
        """Our speed as a fraction of the peer's."""
        return median(each.wall_s for each in self.peer) / median(each.wall_s for each in self.ours)


def peer_command() -> Path:
    """Return the peer's binary. Raises SystemExit when it is not built."""
    engine = version("llama-cpp-python")
    path = cache_directory() / f"llama.cpp-{engine}" / "bin" / "llama-quantize"
    if not path.exists():
        raise SystemExit(f"{path} is not there; build it with tools/build_llama_server.sh")
    return path


def measure(product: Product, source: Path, kind: str, rounds: int, folder: Path) -> Result:
    """Quantize *source* with both, alternately."""
    (folder / "Modelfile").write_text(f"FROM {source}\n")
    product.lm("create", "plain", "-f", str(folder / "Modelfile"), timeout_s=600)
    output = folder / "peer.gguf"
    result = Result([], [], same_bytes=True)
    for number in range(rounds):
        for ours in (True, False) if number % 2 else (False, True):
            if ours:
                result.ours.append(_ours(product, kind))
            else:
                result.peer.append(_peer(source, output, kind))
        [digest] = [file["digest"] for file in product.json("show", "small")["files"] if file["role"] == "weights"]
        blob = product.home / "store" / "blobs" / "sha256" / digest.removeprefix("sha256:")
        if not filecmp.cmp(blob, output, shallow=False):
            result = replace(result, same_bytes=False)
        # So that the next round writes it again.
        product.lm("rm", "small")
        product.lm("gc", "--grace", "0s")
    return result


def _peer(source: Path, output: Path, kind: str) -> Round:
    peer, threads = peer_command(), str(len(os.sched_getaffinity(0)))
    output.unlink(missing_ok=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([peer, source, output, kind, threads], capture_output=True, check=True)
    with output.open("rb") as file:
        os.fsync(file.fileno())
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Round(wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _ours(product: Product, kind: str) -> Round:
    daemon = psutil.Process(product.daemons[-1].pid)
    before, began = sum(daemon.cpu_times()[:4]), time.perf_counter()
    product.lm("quantize", "plain", kind, "--name", "small", timeout_s=3600)
    return Round(time.perf_counter() - began, sum(daemon.cpu_times()[:4]) - before)


def main() -> int:
    """Measure and print; return 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model: whether it runs, not how fast")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--type", default="Q4_K_M", dest="kind")
    parser.add_argument("--file", type=Path, help="the model to quantize; made of noise unless given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lm-bench-") as name:
        folder = Path(name)
        (folder / "home").mkdir()
        source = options.file
        if source is None and options.quick:
            source = make_tiny_llama(folder / "noise.gguf", n_layer=2, n_embd=512, n_ff=2048)
        elif source is None:
            source = plain_model(folder)
        with installed(folder / "home") as product:
            product.start()
            rounds = 1 if options.quick else options.rounds
            result = measure(product, source.absolute(), options.kind, rounds, folder)
    print(f"{source.name} to {options.kind}, {os.cpu_count()} processors; medians (and every round)")
    for label, runs in (("llama-quantize", result.peer), ("lm quantize", result.ours)):
        wall_s, cpu_s = median(run.wall_s for run in runs), median(run.cpu_s for run in runs)
        shown = " ".join(f"{run.wall_s:.2f}" for run in runs)
        print(f"  {label:<20}{wall_s:8.2f} s, {cpu_s:.2f} s of processors ({shown})")
    print(f"  same bytes          {'yes' if result.same_bytes else 'NO':>8}")
    verdict = "not judged" if options.quick else "ok" if result.ratio >= _LIMIT else "MISSED"
    print(f"  speed to the peer's {result.ratio:8.2f}    at least {_LIMIT}: {verdict}")
    return 0 if result.same_bytes and (options.quick or result.ratio >= _LIMIT) else 1


if __name__ == "__main__":
    sys.exit(main())
