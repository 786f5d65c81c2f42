"""The types that keys and values can be kept in, as the engine numbers them."""

from __future__ import annotations

from typing import Any

DEFAULT = "f16"
# Keys have a matrix of the engine's when their length is a multiple of this.
_TURNED = 64
# enum ggml_type; the bindings lack some of the names.
_TYPES = {"f16": 1, "bf16": 30, "f32": 0, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}


def is_known(name: str) -> bool:
    """Tell whether there is such a type; "" is the default."""
    return not name or name in _TYPES


def is_quantized(name: str) -> bool:
    """Tell whether numbers share a scale, which only flash attention reads."""
    return name.startswith("q")


def can_move(name: str, key_length: int) -> bool:
    """Tell whether the engine can move keys of this type to other positions.

    It says that it always can. Those of bf16 it cannot turn, and those that share scales it turns by way of a matrix
    that it has for some lengths only; without it the process ends (llama-cpp-python 0.3.36).
    """
    if is_quantized(name):
        return key_length % _TURNED == 0
    return name != "bf16"


def set_kv_type(params: Any, name: str) -> None:
    """Set the type in the parameters of a context."""
    params.type_k = params.type_v = _TYPES[name or DEFAULT]
