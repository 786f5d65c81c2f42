"""The types that keys and values can be kept in."""

from __future__ import annotations

from lmd.registry.capabilities import EMBEDDING_ARCHITECTURES
from lmd.registry.gguf import GgufHeader
from lmd.registry.gguf_types import TENSOR_TYPES, TensorType
from lmd.registry.memory.layers import head_lengths, read_layers

DEFAULT_KV_TYPE = "f16"

KV_TYPES: dict[str, TensorType] = {
    name: kind
    for name in ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
    for kind in TENSOR_TYPES.values()
    if kind.name.lower() == name
}
"""Types by their names, the usual first: the ones that the engine's attention reads."""

#: Architectures that the engine computes attention for in the plain way only.
_PLAIN_ONLY = frozenset({"grok"})


def kv_bytes(items: int, kv_type: str) -> int:
    """Return the bytes of so many numbers, a whole number of blocks."""
    kind = KV_TYPES[kv_type]
    return -(-items // kind.block_items) * kind.block_bytes


def is_quantized(kv_type: str) -> bool:
    """Tell whether numbers share a scale."""
    return KV_TYPES[kv_type].block_items > 1


def kv_type_problem(header: GgufHeader, kv_type: str) -> str:
    """Say why the engine cannot keep this model's keys and values in *kv_type*, "" when it can."""
    if not is_quantized(kv_type) or header.architecture in EMBEDDING_ARCHITECTURES:
        return ""
    if not read_layers(header).has_cache:
        return ""
    if header.architecture in _PLAIN_ONLY:
        return f"models of the architecture {header.architecture} have no flash attention, which {kv_type} needs"
    block = KV_TYPES[kv_type].block_items
    for length in sorted(head_lengths(header)):
        if length % block:
            return (
                f"its heads have {length} numbers, which is no multiple of the {block} that share a scale in {kv_type}"
            )
    return ""
