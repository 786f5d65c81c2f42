"""Importance matrices as `llama-imatrix` writes them, for models of the tests."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from lmd.registry.gguf import GgufHeader


def make_imatrix(path: Path, model: GgufHeader, *, seed: int = 1, cut_columns: int = 0) -> Path:
    """Write one for the matrices of *model* that are in blocks; *cut_columns* fewer columns fit no model."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["tests"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in model.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            columns = tensor.shape[0] - cut_columns
            sums = random.uniform(0.1, 100, (1, columns)).astype(np.float32)
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", np.full((1, 1), 2048, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
