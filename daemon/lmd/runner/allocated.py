"""What the engine allocated, by device and by what it is for, from the buffers that it reports."""

from __future__ import annotations

from collections.abc import Iterable

from lmd.runner.gpus import device_id
from lmd.runner.v1 import frames_pb2

#: (buffer name such as `CPU_Mapped` or `CUDA0`, kind, bytes), as `EngineLog.buffers` has them.
Buffer = tuple[str, str, int]

MAIN_MEMORY = "cpu"

_MAPPED = "_Mapped"


def on_host(buffer_name: str) -> bool:
    """Tell buffers in main memory (`CPU`, `CPU_Mapped`, `CPU_REPACK`, `AMX`, `CUDA_Host`) from a device's (`CUDA0`)."""
    return device_id(buffer_name) == MAIN_MEMORY


def count_copies_once(buffers: list[Buffer], begin: int, weights_bytes: int) -> None:
    """Take out of the mappings of one file, reported from the place *begin* on, what was copied out of them.

    The engine rearranges weights for the processor's instructions and keeps the copies, but reports a mapping from the
    first to the last tensor that stays in it, whatever is between. *weights_bytes* are those of all tensors.
    """
    own = [place for place in range(begin, len(buffers)) if buffers[place][1] == "model"]
    mapped = [place for place in own if buffers[place][0].endswith(_MAPPED) and on_host(buffers[place][0])]
    copied_bytes = sum(buffers[place][2] for place in own if place not in mapped and on_host(buffers[place][0]))
    excess_bytes = sum(buffers[place][2] for place in own) - weights_bytes
    excess_bytes = min(excess_bytes, copied_bytes)
    for place in mapped:
        name, kind, size_bytes = buffers[place]
        taken_bytes = max(0, min(size_bytes, excess_bytes))
        buffers[place] = name, kind, size_bytes - taken_bytes
        excess_bytes -= taken_bytes


def mapped_bytes(buffers: Iterable[Buffer]) -> int:
    """Return the bytes of main memory that the kernel can take back, since they are a file's."""
    return sum(size for name, _, size in buffers if name.endswith(_MAPPED) and on_host(name))


def by_device(buffers: Iterable[Buffer]) -> list[frames_pb2.DeviceBytes]:
    """Return what is on each device, main memory first."""
    found = {MAIN_MEMORY: frames_pb2.DeviceBytes(device=MAIN_MEMORY)}
    for name, kind, size_bytes in buffers:
        device = device_id(name)
        entry = found.setdefault(device, frames_pb2.DeviceBytes(device=device))
        if kind == "model":
            entry.weights_bytes += size_bytes
        elif kind in ("KV", "RS"):
            entry.kv_bytes += size_bytes
        else:
            entry.compute_bytes += size_bytes
    return list(found.values())
