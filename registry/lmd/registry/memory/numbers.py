"""Numbers of a header that may be one for all layers or one for each."""

from __future__ import annotations

from lmd.registry.gguf import GgufArray, GgufHeader

MAX_LAYERS = 4096
"""A header that states more is read as if it stated so many."""


def layer_count(header: GgufHeader) -> int:
    """Return the number of blocks in the file, bounded."""
    return min(header.block_count, MAX_LAYERS)


def first_number(header: GgufHeader, key: str) -> int:
    """Return the number of *key*, that of the first layer when each has its own."""
    return per_layer(header, key, 0, 1)[0]


def per_layer(header: GgufHeader, key: str, default: int, layers: int) -> list[int]:
    """Return the number that each of *layers* layers has for a key of the architecture.

    An array that is too short, or too long to be kept whole, is made up for with its largest number.
    """
    value = header.metadata.get(f"{header.architecture}.{key}")
    if isinstance(value, GgufArray):
        counts = [int(item) for item in value.values if isinstance(item, int) and 0 <= item < 2**31][:layers]
        return counts + [max(counts, default=0)] * (layers - len(counts))
    return [default if value is None else header.arch_number(key)] * layers
