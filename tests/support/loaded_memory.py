"""Loads a model as a runner does and says what the engine allocated; `measure` does it in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Loaded:
    """Bytes of a load by what they are for."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    mapped_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


class LoadFailed(Exception):
    """Raised when the engine refuses; the message is its own."""


def measure(
    path: Path, *, num_ctx: int, slots: int = 1, num_batch: int = 512, kv_type: str = "", use_mmap: bool = True
) -> Loaded:
    """Load the model in *path* and end the process again.

    Raises:
        LoadFailed: the engine refuses it.
    """
    settings = [str(path), str(num_ctx), str(slots), str(num_batch), kv_type, str(int(use_mmap))]
    command = [sys.executable, "-m", "tests.support.loaded_memory", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        raise LoadFailed(done.stdout.strip() or done.stderr[-2000:])
    return Loaded(**json.loads(done.stdout))


def main(path: str, num_ctx: str, slots: str, num_batch: str, kv_type: str, use_mmap: str) -> int:
    """Load it here and write what was allocated as JSON, or why it was not."""
    from lmd.runner.log import EngineLog
    from lmd.runner.model import LoadError, Model
    from lmd.runner.native import load_bindings
    from lmd.runner.v1 import frames_pb2

    llama = load_bindings()
    log = EngineLog(llama)
    llama.llama_backend_init()
    load = frames_pb2.Load(
        model_paths=[path],
        num_ctx=int(num_ctx),
        slots=int(slots),
        num_batch=int(num_batch),
        # Given, so that they are not measured: weights of nothing are not worth computing with.
        num_thread=1,
        use_mmap=use_mmap == "1",
        kv_type=kv_type,
    )
    try:
        ready = Model(llama, log, load, lambda _: True).ready()
    except LoadError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    loaded = Loaded(ready.weights_bytes, ready.kv_bytes, ready.compute_bytes, ready.mapped_bytes)
    sys.stdout.write(json.dumps(asdict(loaded)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
