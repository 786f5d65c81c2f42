"""Quantizing, against llama.cpp's `llama-quantize` on the same input with the same threads.

    lm create --quantize Q4_K_M   to   llama-quantize IN OUT Q4_K_M    at least 0.95 of its speed

Ours is the whole of what a user waits for: the command, the child process, hash, fsync, the check of the result, and
the new name. The peer's output is synced as well, since what is not on the disk is not done. Both are measured
alternately in one run, and the fastest of each counts. The bytes of both must be the same.

    python -m bench.quantize [--quick] [--rounds 3] [--type Q4_K_M] [--file F16.gguf]

`llama-quantize` is built by tools/build_llama_server.sh, or lies in the cache from an earlier run.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench.models import cache_directory
from tests.support.product import Product, installed
from tests.support.tiny_models import make_tiny_llama

_LIMIT = 0.95


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds of the fastest round of each."""

    ours_s: float
    peer_s: float
    same_bytes: bool

    @property
    def ratio(self) -> float:
        """Our speed as a fraction of the peer's."""
        return self.peer_s / self.ours_s


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
    peer, output = peer_command(), folder / "peer.gguf"
    ours_s, peer_s = [], []
    for _ in range(rounds):
        output.unlink(missing_ok=True)
        began = time.perf_counter()
        threads = str(len(os.sched_getaffinity(0)))
        subprocess.run([peer, source, output, kind, threads], capture_output=True, check=True)
        with output.open("rb") as file:
            os.fsync(file.fileno())
        peer_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        product.lm("quantize", "plain", kind, "--name", "small", timeout_s=3600)
        ours_s.append(time.perf_counter() - began)
        [digest] = [file["digest"] for file in product.json("show", "small")["files"] if file["role"] == "weights"]
        blob = product.home / "store" / "blobs" / "sha256" / digest.removeprefix("sha256:")
        same = filecmp.cmp(blob, output, shallow=False)
        # So that the next round writes it again.
        product.lm("rm", "small")
        product.lm("gc", "--grace", "0s")
    return Result(min(ours_s), min(peer_s), same)


def main() -> int:
    """Measure and print; return 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model: whether it runs, not how fast")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--type", default="Q4_K_M", dest="kind")
    parser.add_argument("--file", type=Path, help="the model to quantize; made of noise unless given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lm-bench-") as name:
        folder = Path(name)
        (folder / "home").mkdir()
        source = options.file
        if source is None:
            layers, width = (2, 512) if options.quick else (24, 1024)
            source = make_tiny_llama(folder / "noise.gguf", n_layer=layers, n_embd=width, n_ff=4 * width)
        with installed(folder / "home") as product:
            product.start()
            rounds = 1 if options.quick else options.rounds
            result = measure(product, source.absolute(), options.kind, rounds, folder)
    print(f"{source.name} to {options.kind}, {os.cpu_count()} processors")
    print(f"  llama-quantize      {result.peer_s:8.2f} s")
    print(f"  lm quantize         {result.ours_s:8.2f} s")
    print(f"  same bytes          {'yes' if result.same_bytes else 'NO':>8}")
    verdict = "not judged" if options.quick else "ok" if result.ratio >= _LIMIT else "MISSED"
    print(f"  speed to the peer's {result.ratio:8.2f}    at least {_LIMIT}: {verdict}")
    return 0 if result.same_bytes and (options.quick or result.ratio >= _LIMIT) else 1


if __name__ == "__main__":
    sys.exit(main())
