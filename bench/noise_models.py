"""Models of random weights in the shape of Llama 3 8B, as large as a machine with an accelerator can use.

Written as blocks of Q4_0 that repeat after a few megabytes: what they cost to hold and to read is that of a real model
of 4.7 GB, and making one takes as long as writing it. What they say is noise.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import BinaryIO

from tests.support.shaped_models import F32, Dims, llama

Q4_0 = 2
#: Of 32 weights: a scale of 16 bits, and 4 bits each.
_BLOCK_BYTES = 18
_TILE_BLOCKS = 1 << 16
_ALIGNMENT = 32

EIGHT_B = Dims(
    layers=32, width=4096, heads=32, kv_heads=8, head=128, inner=14336, vocab=128_256, train_ctx=131_072, kind=Q4_0
)


def write_noise(path: Path, *, seed: int, dims: Dims = EIGHT_B) -> Path:
    """Write a model; *seed* makes it another one."""
    shape = llama(dims)
    shape.write(path)
    noise, ones = _noise(seed), struct.pack("<f", 1.0) * 1024
    padded_bytes = [-(-tensor.size_bytes // _ALIGNMENT) * _ALIGNMENT for tensor in shape.tensors]
    with path.open("r+b") as file:
        # So far there is a header, and a hole for the weights.
        file.seek(-sum(padded_bytes), os.SEEK_END)
        for tensor, size_bytes in zip(shape.tensors, padded_bytes, strict=True):
            begin = file.tell()
            _repeat(file, ones if tensor.type_id == F32 else noise, tensor.size_bytes)
            file.seek(begin + size_bytes)
    return path


def _noise(seed: int) -> bytes:
    source = random.Random(seed)
    # Small weights, so that sums of thousands of them stay in range.
    scale = struct.pack("<e", 0.004)
    quants = source.randbytes(16 * _TILE_BLOCKS)
    return b"".join(scale + quants[16 * block : 16 * block + 16] for block in range(_TILE_BLOCKS))


def _repeat(file: BinaryIO, tile: bytes, size_bytes: int) -> None:
    for _ in range(size_bytes // len(tile)):
        file.write(tile)
    file.write(tile[: size_bytes % len(tile)])
