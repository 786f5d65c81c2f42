"""Asks the engine which devices it can use: `python -m lmd.runner.probe`, started by the daemon.

A process of its own, because a backend may start a driver that never gives back its memory, hang in it, or abort. It
prints one JSON document to standard output and ends with status 0; what libraries print goes to standard error:

    {"engine": "0.3.36",
     "limits": {"CUDA_VISIBLE_DEVICES": "0"},
     "devices": [{"id": "cuda0", "name": "CUDA0", "backend": "cuda", "kind": "gpu", "description": "…",
                  "bus_id": "0000:01:00.0", "total_bytes": 1, "free_bytes": 1}]}
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lmd.runner.confine import drop_rights, never_block_on_stderr, tie_to_parent
from lmd.runner.gpus import engine_devices
from lmd.runner.log import EngineLog
from lmd.runner.native import engine_version, load_bindings

# What hides devices from the engine.
_LIMITS = (
    "CUDA_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ONEAPI_DEVICE_SELECTOR",
    "ROCR_VISIBLE_DEVICES",
)


def probe(env: Mapping[str, str]) -> dict[str, Any]:
    """Return what is printed."""
    llama = load_bindings()
    EngineLog(llama)  # its warnings go to standard error
    llama.llama_backend_init()
    devices = []
    for device in engine_devices():
        fields = asdict(device)
        del fields["handle"]
        devices.append(fields)
    limits = {name: env[name] for name in _LIMITS if env.get(name)}
    return {"engine": engine_version(), "limits": limits, "devices": devices}


def main() -> int:
    """Run the process; return its exit status."""
    tie_to_parent()
    drop_rights()
    never_block_on_stderr()
    ours = os.dup(1)
    os.dup2(2, 1)
    document = json.dumps(probe(os.environ)).encode()
    with os.fdopen(ours, "wb") as out:
        out.write(document)
    return 0


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # A driver's own clean-up may hang, and the kernel cleans up anyway.
    os._exit(status)
