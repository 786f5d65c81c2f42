"""The types that keys and values can be kept in: the ones that the engine's attention reads."""

from __future__ import annotations

from lmd.registry.gguf_types import TENSOR_TYPES, TensorType

DEFAULT_KV_TYPE = "f16"

KV_TYPES: dict[str, TensorType] = {
    name: kind
    for name in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
    for kind in TENSOR_TYPES.values()
    if kind.name.lower() == name
}
"""Types by their names, the most exact first."""

_SIXTEEN_BITS = ("f16", "bf16")


def kv_type_bytes(items: int, kv_type: str) -> int:
    """Return the bytes of so many numbers, a whole number of blocks."""
    kind = KV_TYPES[kv_type]
    return -(-items // kind.block_items) * kind.block_bytes


def is_quantized(kv_type: str) -> bool:
    """Tell whether numbers share a scale."""
    return KV_TYPES[kv_type].block_items > 1


def most_exact(*kv_types: str) -> str:
    """Return the one that keeps the most; of several alike the first."""
    names = list(KV_TYPES)
    return min(kv_types, key=lambda kv_type: names.index(kv_type) if kv_type not in _SIXTEEN_BITS else 1)


def is_as_exact(kv_type: str, wanted: str) -> bool:
    """Tell whether what is kept in *kv_type* loses nothing that *wanted* keeps.

    Of the two types of 16 bits one has the larger range and the other the finer steps: neither stands for the other.
    """
    if kv_type in _SIXTEEN_BITS and wanted in _SIXTEEN_BITS:
        return kv_type == wanted
    names = list(KV_TYPES)
    return names.index(kv_type) <= names.index(wanted)
