"""Where the weights of a model go: repeating layers, what comes before them and what comes after."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lmd.registry.gguf import GgufHeader, TensorInfo

MAX_LAYERS = 4096
"""A header that states more is read as if it stated so many."""

_LAYER = re.compile(r"(?:blk|enc\.blk|dec\.blk)\.(\d{1,6})\.")
_EMBEDDING = "token_embd.weight"
# What the engine keeps with the token embedding in main memory.
_INPUT = ("token_embd", "token_types", "position_embd", "per_layer_token_embd", "altup_", "per_layer_")
_HEADS = ("output.weight", "cls.", "cls_out", "dense_")
_EXPERTS = re.compile(r"_exps\.")


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of weights by where they go; see `MemoryEstimate`."""

    layers: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    active_bytes: int


def split_weights(header: GgufHeader) -> Weights:
    """Sort the tensors of *header*, which is that of the whole model."""
    layers = [0] * min(header.block_count, MAX_LAYERS)
    input_bytes = output_bytes = active_bytes = 0
    tied = _tied_head(header)
    for tensor in header.tensors:
        layer = _LAYER.match(tensor.name)
        if layer is not None and int(layer[1]) < len(layers):
            layers[int(layer[1])] += tensor.size_bytes
            active_bytes += _active(header, tensor)
        elif tensor.name.startswith(_INPUT):
            # A token reads one row of it.
            input_bytes += tensor.size_bytes
        else:
            output_bytes += tensor.size_bytes
            active_bytes += tensor.size_bytes
    return Weights(tuple(layers), input_bytes, output_bytes + tied, active_bytes + tied)


def _tied_head(header: GgufHeader) -> int:
    """Return the bytes of the token embedding when it is the head as well, else 0."""
    if any(tensor.name.startswith(_HEADS) for tensor in header.tensors):
        return 0
    if not any(tensor.name.startswith("output_norm") for tensor in header.tensors):
        return 0
    return sum(tensor.size_bytes for tensor in header.tensors if tensor.name == _EMBEDDING)


def _active(header: GgufHeader, tensor: TensorInfo) -> int:
    """Return how many bytes of a layer's tensor are read for a token."""
    experts, used = header.arch_number("expert_count"), header.arch_number("expert_used_count")
    if not _EXPERTS.search(tensor.name) or not 0 < used < experts:
        return tensor.size_bytes
    return tensor.size_bytes * used // experts
