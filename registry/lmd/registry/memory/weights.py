"""Where the weights of a model go: repeating layers, what comes before them and what comes after.

Source: `LLM_TENSOR_INFOS` and `llama_model_base::load_tensors` of llama.cpp (llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lmd.registry.gguf import GgufHeader, TensorInfo
from lmd.registry.memory.numbers import first_number, layer_count
from lmd.registry.memory.remembered import once_per_header

_LAYER = re.compile(r"(?:enc\.|dec\.)?blk\.(\d{1,6})\.")
_EMBEDDING = "token_embd.weight"
#: What the engine keeps with the token embedding in main memory.
_INPUT = ("token_embd.", "token_types.", "position_embd.", "per_layer_token_embd.")
#: What has no number and is placed with the first layer all the same.
_FIRST_LAYER = ("token_embd_norm.", "per_layer_model_proj.", "per_layer_proj_norm.", "rope_f")
_HEADS = ("output.weight", "cls.", "cls_", "dense_")
_EXPERTS = re.compile(r"_ch?exps\.|_exps\.")


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of weights by where they go; see `MemoryEstimate`."""

    total_bytes: int
    layers: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    active_bytes: int


@once_per_header
def split_weights(header: GgufHeader) -> Weights:
    """Sort the tensors of *header*, which is that of the whole model."""
    layers = [0] * layer_count(header)
    # The engine leaves out layers that predict further tokens, unless it is told otherwise.
    served = len(layers) - min(header.arch_number("nextn_predict_layers"), len(layers))
    total = inputs = outputs = active = 0
    for tensor in header.tensors:
        size = tensor.size_bytes
        match = _LAYER.match(tensor.name)
        layer = int(match[1]) if match else None
        if layer is None and tensor.name.startswith(_FIRST_LAYER) and header.architecture != "lfm2" and layers:
            layer = 0
        if layer is None or layer >= len(layers):
            if tensor.name.startswith(_INPUT):
                # A token reads one row of it.
                inputs += size
            else:
                outputs += size
                active += size
        elif layer < served:
            layers[layer] += size
            active += _active(header, tensor)
        else:
            continue
        total += size
    tied = _tied_head(header)
    return Weights(total, tuple(layers), inputs, outputs + tied, active + tied)


def _tied_head(header: GgufHeader) -> int:
    """Return the bytes of the token embedding when it is the head as well, else 0."""
    names = [tensor.name for tensor in header.tensors]
    if any(name.startswith(_HEADS) for name in names):
        return 0
    # An encoder has no norm at its end, and no head.
    last = "token_embd_norm" if header.architecture == "lfm2" else "output_norm"
    if not any(name.startswith(last) for name in names):
        return 0
    return sum(tensor.size_bytes for tensor in header.tensors if tensor.name == _EMBEDDING)


def _active(header: GgufHeader, tensor: TensorInfo) -> int:
    """Return how many bytes of a layer's tensor are read for a token."""
    experts, used = header.arch_number("expert_count"), first_number(header, "expert_used_count")
    if not _EXPERTS.search(tensor.name) or not 0 < used < experts:
        return tensor.size_bytes
    return tensor.size_bytes * used // experts
