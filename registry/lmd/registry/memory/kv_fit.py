"""Whether the engine can keep a model's keys and values in a type."""

from __future__ import annotations

from lmd.registry.capabilities import EMBEDDING_ARCHITECTURES
from lmd.registry.gguf import GgufHeader
from lmd.registry.kv_types import KV_TYPES, is_quantized
from lmd.registry.memory.layers import head_lengths, read_layers

#: Architectures that the engine computes attention for in the plain way only.
_PLAIN_ONLY = frozenset({"grok"})


def keeps_keys(header: GgufHeader) -> bool:
    """Tell whether a model keeps keys and values at all: encoders do not, nor do recurrent layers alone."""
    return header.architecture not in EMBEDDING_ARCHITECTURES and read_layers(header).has_cache


def kv_type_problem(header: GgufHeader, kv_type: str) -> str:
    """Say why the engine cannot keep this model's keys and values in *kv_type*, "" when it can."""
    if not is_quantized(kv_type) or not keeps_keys(header):
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
