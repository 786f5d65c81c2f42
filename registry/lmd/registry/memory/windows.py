"""Which layers of a model see only a window of the context, as the engine decides it.

Source: `load_arch_hparams` of llama.cpp's models and `llama_hparams::set_swa_pattern` (llama-cpp-python 0.3.36). A file
can say for each layer whether it has a window, or give a period; families differ in the period when it says nothing,
and in whether the layers without a window come first or last in it. Headers of other families may state a window that
the engine does not use, such as phi3's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmd.registry.gguf import GgufArray, GgufHeader

_PATTERN = "attention.sliding_window_pattern"


@dataclass(frozen=True, slots=True)
class _Family:
    """The defaults of an architecture: one layer of *period* has no window, the last or with *dense_first* the first.

    *window* stands when the file states none; *fixed* whatever it states, unless 0.
    """

    period: int
    dense_first: bool = False
    window: int = 0
    fixed: int = 0


_FAMILIES = {
    "afmoe": _Family(4),
    "cohere2": _Family(4),
    "cohere2moe": _Family(4, dense_first=True),
    "exaone-moe": _Family(4, window=128),
    "exaone4": _Family(4, window=4096),
    "gemma-embedding": _Family(6),
    "gemma2": _Family(2, window=4096),
    "gemma3": _Family(6),
    "gemma3n": _Family(5),
    "gpt-oss": _Family(2),
    "laguna": _Family(4, dense_first=True),
    "llama4": _Family(4, window=8192, fixed=8192),
    "mellum": _Family(4),
    "modern-bert": _Family(3, dense_first=True),
    "muse-glimmer": _Family(4),
    "olmo2": _Family(4),
    "plamo3": _Family(8),
    "smallthinker": _Family(4, dense_first=True, fixed=4096),
}
#: Every layer with attention has one.
_ALL_LAYERS = frozenset({"lfm2"})
#: The one size of EXAONE 4 that has windows; the others state one all the same.
_EXAONE4_LAYERS = 64


def window_of(header: GgufHeader) -> int:
    """Return the tokens of a window that the engine reads from the header, 0 when it reads none."""
    architecture = header.architecture
    stated = header.arch_number("attention.sliding_window")
    family = _FAMILIES.get(architecture)
    if family is None:
        return stated if architecture in _ALL_LAYERS or _by_layer(header) is not None else 0
    if f"{architecture}.attention.sliding_window" not in header.metadata:
        return family.window if architecture != "exaone4" or header.block_count == _EXAONE4_LAYERS else 0
    return family.fixed or stated if stated else 0


def windowed_layers(header: GgufHeader, attention: Sequence[bool]) -> list[bool]:
    """Tell for each layer whether it has a window; *attention* tells which have attention."""
    layers = len(attention)
    if window_of(header) == 0:
        return [False] * layers
    if header.architecture in _ALL_LAYERS:
        return list(attention)
    if header.architecture == "exaone4" and layers != _EXAONE4_LAYERS:
        return [False] * layers
    stated = _by_layer(header)
    if stated is not None:
        return [*stated, *[False] * layers][:layers]
    family = _FAMILIES.get(header.architecture)
    if family is None:
        return [False] * layers
    period = header.arch_number(_PATTERN) if f"{header.architecture}.{_PATTERN}" in header.metadata else family.period
    if period == 0:
        return [True] * layers
    dense = 0 if family.dense_first else period - 1
    return [layer % period != dense for layer in range(layers)]


def _by_layer(header: GgufHeader) -> list[bool] | None:
    """Return what the file says of each layer, None when it does not."""
    value = header.metadata.get(f"{header.architecture}.{_PATTERN}")
    return [bool(item) for item in value.values] if isinstance(value, GgufArray) else None
