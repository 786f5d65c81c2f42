"""Models of random weights in the shape of Llama 3 8B, as large as a machine with an accelerator can use.

Written as blocks of Q4_0 that repeat after a few megabytes: what they cost to hold and to read is that of a real model
of 4.7 GB, and making one takes as long as writing it. What they say is noise.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

from tests.support.gguf_bytes import gguf
from tests.support.shaped_models import F32, Dims, Shape, llama

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
    noise = _noise(seed)
    with path.open("wb") as file:
        file.write(_header(shape))
        for tensor in shape.tensors:
            _write(file.write, struct.pack("<f", 1.0) * 1024 if tensor.type_id == F32 else noise, tensor.size_bytes)
            file.write(bytes(-tensor.size_bytes % _ALIGNMENT))
    return path


def _header(shape: Shape) -> bytes:
    # With every tensor in its place and no weights behind it.
    metadata = shape._metadata()
    whole = gguf(metadata, shape.tensors)
    size_bytes = sum(-(-tensor.size_bytes // _ALIGNMENT) * _ALIGNMENT for tensor in shape.tensors)
    return whole[: len(whole) - min(size_bytes, 2**24)]


def _noise(seed: int) -> bytes:
    source = random.Random(seed)
    # Small weights, so that sums of thousands of them stay in range.
    scale = struct.pack("<e", 0.004)
    quants = source.randbytes(16 * _TILE_BLOCKS)
    return b"".join(scale + quants[16 * block : 16 * block + 16] for block in range(_TILE_BLOCKS))


def _write(write: object, tile: bytes, size_bytes: int) -> None:
    assert callable(write)
    view = memoryview(tile)
    while size_bytes > 0:
        write(view[: min(size_bytes, len(tile))])
        size_bytes -= min(size_bytes, len(tile))
