"""LoRA adapters for tiny models, and the models that one would get by adding them to the weights.

An adapter's matrices are random, and large enough to change what greedy decoding says. Merging is plain numpy on the
base's file, and shares nothing with the engine: it is what answers with adapters are held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
#: The weights of a matrix by its name: `lora_a` and `lora_b`, of which the second times the first is added.
Pairs = Mapping[str, tuple[Array, Array]]

#: What adapters change as a rule.
ATTENTION = ("blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.1.attn_q.weight", "blk.1.attn_v.weight")


def make_tiny_adapter(
    path: Path,
    base: Path,
    *,
    seed: int = 1,
    rank: int = 4,
    alpha: float = 8.0,
    strength: float = 1.0,
    tensors: Sequence[str] = ATTENTION,
    architecture: str | None = None,
    kind: str = "adapter",
    adapter_type: str = "lora",
    invocation_tokens: Sequence[int] = (),
    widen: int = 0,
) -> Path:
    """Write an adapter for some matrices of the model in *base*.

    *widen* makes its matrices fit a model whose rows are longer by so much; *invocation_tokens* make it one that starts
    at those tokens only.
    """
    reader = gguf.GGUFReader(base)
    shapes = {tensor.name: tuple(int(length) for length in tensor.shape) for tensor in reader.tensors}
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture or str(reader.fields["general.architecture"].contents()))
    writer.add_type(kind)
    writer.add_name(path.stem)
    writer.add_string("adapter.type", adapter_type)
    writer.add_float32("adapter.lora.alpha", alpha)
    if invocation_tokens:
        writer.add_key_value(
            "adapter.alora.invocation_tokens",
            list(invocation_tokens),
            gguf.GGUFValueType.ARRAY,
            gguf.GGUFValueType.UINT32,
        )
    for name in tensors:
        columns, rows = shapes[name][0] + widen, shapes[name][1]
        # Embeddings are looked up by row, so the engine wants A with a row for each token.
        small_shape, large_shape = (rank, columns), (rows, rank)
        if name == "token_embd.weight":
            small_shape, large_shape = (rows, rank), (columns, rank)
        small = random.standard_normal(small_shape, dtype=np.float32) * np.float32(strength / columns**0.5)
        large = random.standard_normal(large_shape, dtype=np.float32) * np.float32(strength / rank**0.5)
        writer.add_tensor(f"{name}.lora_a", small)
        writer.add_tensor(f"{name}.lora_b", large)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merge(path: Path, base: Path, adapters: Sequence[tuple[Path, float]]) -> Path:
    """Write *base* with adapters of these scales added: `W + scale * alpha / rank * B A` (arXiv 2106.09685)."""
    reader = gguf.GGUFReader(base)
    weights = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}
    for adapter, scale in adapters:
        alpha, pairs = _read(adapter)
        for name, (small, large) in pairs.items():
            # In double precision, so that the only rounding of note is the engine's.
            a, b = small.astype(np.float64), large.astype(np.float64)
            change = a @ b.T if name == "token_embd.weight" else b @ a
            weights[name] = (weights[name] + change * (scale * alpha / b.shape[1])).astype(np.float32)
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            item_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], item_type)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _read(adapter: Path) -> tuple[float, Pairs]:
    reader = gguf.GGUFReader(adapter)
    found: dict[str, Any] = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}
    names = [name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")]
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    return alpha, {name: (found[f"{name}.lora_a"], found[f"{name}.lora_b"]) for name in names}
