"""GGUF files of any size for tests that move models about: a valid header, and tensor data from a seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping


def make_gguf(
    data_bytes: int = 4096,
    *,
    seed: int = 1,
    shard: tuple[int, int] | None = None,
    extra: Mapping[str, str | int] | None = None,
) -> bytes:
    """Return a GGUF with one F32 tensor of *data_bytes*; *shard* is (number from 0, count)."""
    metadata: dict[str, str | int] = {"general.architecture": "llama", "general.name": f"seed {seed}"}
    if shard is not None:
        metadata |= {"split.no": shard[0], "split.count": shard[1], "split.tensors.count": shard[1]}
    metadata |= extra or {}
    items = max(1, data_bytes // 4)
    name = f"blk.{shard[0] if shard else 0}.weight"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(metadata))
    for key, value in metadata.items():
        head += _text(key)
        if isinstance(value, str):
            head += struct.pack("<I", 8) + _text(value)
        else:
            head += struct.pack("<IH", 2, value) if key.startswith("split.") else struct.pack("<II", 4, value)
    head += _text(name) + struct.pack("<IQIQ", 1, items, 0, 0)
    head += bytes(-len(head) % 32)
    return head + random.Random(seed).randbytes(items * 4)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data
