"""Compare a pull with `hf_hub_download` of the same file from the same server: `python -m bench.pull`.

The server is a process of its own. Each round makes every kind of download once, so that what else the machine does
hits all of them. Every client is a process of its own too, which has imported what it needs before the clock starts.
Reported are the medians: bytes a second until everything is received and verified, and until it is durable (which is
the disk's business), the ratio of the former to `hf_hub_download`, which neither hashes nor syncs, what SHA-256 alone
does here, and how much memory a pull took beyond that of a tiny one. The bar is a ratio of 3, and 20 MB of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPO = "bench/model"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pull")
    parser.add_argument("--size-mb", type=int, default=500, help="size of the file, in millions of bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default is the temporary directory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=("lmd", "hub"), help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "lmd":
        emit(pull(options.endpoint, options.work, options.file))
    elif options.child == "hub":
        emit(hub_download(options.endpoint, options.work, options.file))
    else:
        report(options, compare(options))


def emit(result: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")


def pull(endpoint: str, work: Path, filename: str) -> dict[str, float]:
    """Pull with a puller of our own, noting when the bytes were there and when they were durable."""
    import huggingface_hub

    from lmd.registry.aliases import AliasTable
    from lmd.registry.pull import Puller, PullEvent, PullState
    from lmd.registry.ref import parse_ref
    from lmd.registry.sources import hub_client
    from lmd.registry.store import Store

    assert huggingface_hub.HfApi is not None
    assert hub_client.MAX_REPLY_BYTES > 0
    moments: dict[PullState, float] = {}

    def note(event: PullEvent) -> None:
        moments.setdefault(event.state, time.perf_counter())

    with Store.open(work / "store") as store:
        puller = Puller(store, AliasTable.load(None), endpoint=endpoint, user_agent="lmd-bench/0")
        started = time.perf_counter()
        puller.pull(parse_ref(f"hf.co/{REPO}:{filename}"), token=None, on_event=note, cancelled=threading.Event())
        ended = time.perf_counter()
        puller.close()
    # Then everything is there and verified; what follows is making it durable, the manifest, and the tag.
    verified = moments.get(PullState.COMMITTING, moments[PullState.DONE])
    return {"seconds": verified - started, "sync_seconds": ended - verified, "rss_kb": peak_kb()}


def hub_download(endpoint: str, work: Path, filename: str) -> dict[str, float]:
    """Download with huggingface_hub over plain HTTP, as it does where Xet is off."""
    from huggingface_hub import HfApi, hf_hub_download

    HfApi(endpoint=endpoint, token=False)
    started = time.perf_counter()
    hf_hub_download(REPO, filename, endpoint=endpoint, token=False, cache_dir=work / "cache")
    return {"seconds": time.perf_counter() - started, "sync_seconds": 0.0, "rss_kb": peak_kb()}


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(options: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="lmd-bench-", dir=options.dir) as name:
        base = Path(name)
        big, tiny = base / "repo" / "big.Q8_0.gguf", base / "repo" / "tiny.Q4_0.gguf"
        big.parent.mkdir()
        write_model(big, options.size_mb * 1_000_000)
        write_model(tiny, 100_000)
        command = [sys.executable, "-m", "tests.support.hub", "--repo", f"{REPO}={big.parent}", "--until-stdin-ends"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hub:
            assert hub.stdin is not None
            assert hub.stdout is not None
            endpoint = json.loads(hub.stdout.readline())["endpoint"]
            # One of each is not counted: it fills the page cache.
            for kind in ("lmd", "hub"):
                run_child(kind, endpoint, base / "work", big.name)
            rounds: dict[str, list[dict[str, float]]] = {"lmd": [], "hub": []}
            for number in range(options.rounds):
                for kind in ("lmd", "hub") if number % 2 else ("hub", "lmd"):
                    rounds[kind].append(run_child(kind, endpoint, base / "work", big.name))
            small = run_child("lmd", endpoint, base / "work", tiny.name)
            hub.stdin.close()
    return summary(rounds, small, big_bytes=options.size_mb * 1_000_000)


def write_model(path: Path, size_bytes: int) -> None:
    """Write a valid GGUF; its data repeats one random megabyte, which no one on the way compresses."""
    from tests.support.gguf_file import write_gguf

    write_gguf(path, size_bytes, block=os.urandom(1 << 20))


def run_child(kind: str, endpoint: str, work: Path, filename: str) -> dict[str, float]:
    work.mkdir()
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = os.environ | settings | {"HF_HOME": str(work / "hf")}
    command = [sys.executable, "-m", "bench.pull", "--child", kind, "--endpoint", endpoint, "--file", filename]
    try:
        done = subprocess.run(
            [*command, "--work", str(work)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    finally:
        shutil.rmtree(work)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(rounds: dict[str, list[dict[str, float]]], small: dict[str, float], *, big_bytes: int) -> dict[str, object]:
    seconds = {kind: statistics.median(r["seconds"] for r in results) for kind, results in rounds.items()}
    sync_s = statistics.median(r["sync_seconds"] for r in rounds["lmd"])
    peak_kb = max(r["rss_kb"] for r in rounds["lmd"])
    return {
        "size_bytes": big_bytes,
        "rounds": len(rounds["lmd"]),
        "lmd_bytes_per_s": round(big_bytes / seconds["lmd"]),
        "lmd_bytes_per_s_with_sync": round(big_bytes / (seconds["lmd"] + sync_s)),
        "hf_hub_download_bytes_per_s": round(big_bytes / seconds["hub"]),
        "ratio": round(seconds["hub"] / seconds["lmd"], 2),
        "ratio_of_the_fastest": round(
            min(r["seconds"] for r in rounds["hub"]) / min(r["seconds"] for r in rounds["lmd"]), 2
        ),
        "ratios": [round(h["seconds"] / o["seconds"], 2) for h, o in zip(rounds["hub"], rounds["lmd"], strict=True)],
        "sync_seconds": round(sync_s, 3),
        "sha256_bytes_per_s": round(hash_speed()),
        "rss_growth_bytes": round((peak_kb - small["rss_kb"]) * 1024),
    }


def hash_speed() -> float:
    """Return what SHA-256 alone does here: no pull that verifies can be faster."""
    data = bytes(1 << 20)
    started = time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(200):
        digest.update(data)
    return 200 * len(data) / (time.perf_counter() - started)


def report(options: argparse.Namespace, result: dict[str, object]) -> None:
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, value in result.items():
        shown = f"{value / 1e6:.0f} MB/s" if "_per_s" in name and isinstance(value, int) else value
        sys.stdout.write(f"{name:28} {shown}\n")


if __name__ == "__main__":
    main()
