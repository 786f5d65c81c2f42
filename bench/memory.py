"""Resident memory of the idle daemon, and how it grows with use: whole-process figures in MB (10^6 bytes).

Bars: idle under 90 MB; after a pull of any size within 20 MB of that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import psutil

from tests.support.hub import HubServer
from tests.support.product import installed

IDLE_BAR_MB = 90.0
GROWTH_BAR_MB = 20.0


def rss_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 1e6


def measure(size_bytes: int) -> dict[str, float]:
    """Return the figures for one daemon that idles and then pulls one file of *size_bytes*."""
    with tempfile.TemporaryDirectory(prefix="lm-bench-") as scratch:
        big = Path(scratch) / "big.gguf"
        make_gguf(big, size_bytes)
        home = Path(scratch) / "home"
        home.mkdir()
        with HubServer() as hub, installed(home, HF_ENDPOINT=hub.endpoint) as product:
            hub.add_repo("bench/big", {big.name: big})
            daemon = product.start()
            idle = rss_mb(daemon.pid)
            product.lm("ls")
            product.lm("status")
            used = rss_mb(daemon.pid)
            product.lm("pull", "hf.co/bench/big", timeout_s=600)
            pulled = rss_mb(daemon.pid)
            daemon.stop()
    return {"idle_mb": idle, "after_ls_mb": used, "after_pull_mb": pulled, "pull_size_mb": size_bytes / 1e6}


def make_gguf(path: Path, size_bytes: int) -> None:
    """Write a GGUF of about *size_bytes* whose tensors are random: real enough to pull, not to run."""
    import gguf
    import numpy as np

    rows = max(1, size_bytes // (4096 * 4) // 16)
    writer = gguf.GGUFWriter(path, "llama")
    for index in range(16):
        block = np.frombuffer(os.urandom(4096 * 4), dtype=np.float32)
        writer.add_tensor(f"blk.{index}.w", np.tile(np.nan_to_num(block), (rows, 1)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mb", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = measure(args.size_mb * 1_000_000)
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:14} {value:8.1f}")
        print(f"idle under {IDLE_BAR_MB:g} MB: {figures['idle_mb'] < IDLE_BAR_MB}")
        growth = figures["after_pull_mb"] - figures["after_ls_mb"]
        print(f"growth by the pull {growth:.1f} MB, bar {GROWTH_BAR_MB:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
