"""The engine's own limit: llama.cpp's benchmarks, which have no server around them, on the same model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from bench.serving_cases import CURVE, NEW_TOKENS

_TIMEOUT_S = 900


def llama_bench(programs: Path, model: Path, *, threads: int, repetitions: int) -> dict[str, float]:
    """Return tokens a second of reading a prompt and of one answer."""
    lengths = {"prefill_512": (512, 0), "generate": (0, NEW_TOKENS)}
    command = [str(programs / "llama-bench"), "-m", str(model), "-o", "json", "-r", str(repetitions)]
    command += ["-p", "512", "-n", str(NEW_TOKENS), "-t", str(threads or os.cpu_count())]
    found = json.loads(_run(command))
    return {
        f"{name}_tokens_per_s": round(entry["avg_ts"], 1)
        for name, length in lengths.items()
        for entry in found
        if (entry["n_prompt"], entry["n_gen"]) == length
    }


def llama_batched_bench(
    programs: Path, model: Path, *, threads: int, unified: bool = False
) -> dict[str, dict[str, float]]:
    """Return, for each number of sequences, tokens a second of reading prompts of 64 tokens, and of the answers."""
    command = [str(programs / "llama-batched-bench"), "-m", str(model), "--output-format", "jsonl"]
    command += ["-c", str(max(CURVE) * 256), "-npp", "64", "-ntg", str(NEW_TOKENS)]
    command += ["-npl", ",".join(map(str, CURVE)), "-t", str(threads or os.cpu_count())]
    command += ["--kv-unified"] if unified else []
    lines = [json.loads(line) for line in _run(command).splitlines() if line.startswith("{")]
    return {
        str(line["pl"]): {
            "prefill_tokens_per_s": round(line["speed_pp"], 1),
            "generate_tokens_per_s": round(line["speed_tg"], 1),
            "tokens_per_s": round(line["pl"] * NEW_TOKENS / line["t"], 1),
        }
        for line in lines
    }


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def limits(programs: Path, model: Path, *, threads: int, repetitions: int) -> dict[str, Any]:
    """Return all of them."""
    return {
        "llama_bench": llama_bench(programs, model, threads=threads, repetitions=repetitions),
        "llama_batched_bench": llama_batched_bench(programs, model, threads=threads),
    }
