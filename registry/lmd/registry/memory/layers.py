"""What each layer of a model keeps of the context: keys and values for each token, a state for each sequence, or both.

Source: `llama_model::create_memory`, `llama_kv_cache` and `llama_hparams` of llama.cpp (llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from dataclasses import dataclass

from lmd.registry.capabilities import EMBEDDING_ARCHITECTURES
from lmd.registry.gguf import GgufHeader
from lmd.registry.memory.numbers import first_number, layer_count, per_layer
from lmd.registry.memory.remembered import once_per_header
from lmd.registry.memory.windows import window_of, windowed_layers

_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
#: Layers without heads for keys have a state instead.
_BY_HEADS = frozenset(
    {"jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next"}
)
#: Layers without heads for keys and without a feed-forward network have a state, those with one have nothing.
_BY_HEADS_AND_WIDTH = frozenset({"nemotron_h", "nemotron_h_moe"})
#: The last of so many layers has attention, the others a state, unless the file says otherwise.
_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
_BOTH_EVERYWHERE = frozenset({"falcon-h1"})
#: Layers from this one on look at keys and values of those before.
_GEMMA3N_OWN_LAYERS = 20
#: Architectures that have an index of keys beside the cache, to find the tokens worth attending to.
_INDEXED = frozenset({"deepseek32", "glm-dsa", "dots3note", "hy_v4"})


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a layer keeps.

    Attributes:
        keys: numbers for each token.
        values: numbers for each token.
        windowed: whether only for the tokens of a window.
        state: numbers for each sequence.
    """

    keys: int = 0
    values: int = 0
    windowed: bool = False
    state: int = 0


@dataclass(frozen=True, slots=True)
class Layers:
    """All layers of a model.

    Attributes:
        kinds: one for each layer.
        window: tokens of a window; 0 when the engine knows of none.
        has_state: whether the engine keeps a state for each sequence.
    """

    kinds: tuple[LayerKind, ...]
    window: int
    has_state: bool

    @property
    def each_sequence_costs(self) -> bool:
        """Whether memory grows with the number of sequences, so that the runner makes no more than it serves."""
        return self.window > 0 or self.has_state

    @property
    def has_windows(self) -> bool:
        """Whether any layer has one."""
        return any(kind.windowed for kind in self.kinds)

    @property
    def has_full_attention(self) -> bool:
        """Whether any layer sees the whole context."""
        return any(kind.keys and not kind.windowed for kind in self.kinds)

    @property
    def has_cache(self) -> bool:
        """Whether there are keys and values at all."""
        return any(kind.keys for kind in self.kinds)


@once_per_header
def read_layers(header: GgufHeader) -> Layers:
    """Return what the layers of *header* keep."""
    count = layer_count(header)
    if header.architecture in EMBEDDING_ARCHITECTURES:
        return Layers(tuple(LayerKind() for _ in range(count)), window_of(header), has_state=False)
    # Layers that predict further tokens are in the file and not in the context.
    served = count - min(header.arch_number("nextn_predict_layers"), count)
    heads = _kv_heads(header, count)
    recurrent = _recurrent_layers(header, heads)
    own = _layers_with_own_keys(header, count)
    attention = [layer < own and _attends(header, layer, heads, recurrent) for layer in range(count)]
    windowed = windowed_layers(header, attention)
    state = _state_items(header)
    mla = header.arch_number("attention.key_length_mla") > 0 and header.arch_number("attention.value_length_mla") > 0
    index = header.arch_number("attention.indexer.key_length") if header.architecture in _INDEXED else 0
    kinds = []
    for layer in range(count):
        kind = LayerKind()
        if layer < served:
            key_length, value_length = _lengths(header, windowed=windowed[layer])
            attends = attention[layer]
            kind = LayerKind(
                keys=heads[layer] * key_length + index if attends else 0,
                # Of a shared latent the values are a part of the keys.
                values=heads[layer] * value_length if attends and not mla else 0,
                windowed=attends and windowed[layer],
                state=state if recurrent[layer] else 0,
            )
        kinds.append(kind)
    return Layers(tuple(kinds), window_of(header), has_state=any(recurrent))


@once_per_header
def head_lengths(header: GgufHeader) -> set[int]:
    """Return the lengths of keys and of values that the layers have."""
    return {*_lengths(header, windowed=False), *_lengths(header, windowed=True)}


def _lengths(header: GgufHeader, *, windowed: bool) -> tuple[int, int]:
    """Return the lengths of a key and of a value for one head."""
    heads = first_number(header, "attention.head_count")
    default = header.embedding_length // heads if heads else 0
    key = header.arch_number("attention.key_length") or default
    value = header.arch_number("attention.value_length") or default
    if windowed:
        key = header.arch_number("attention.key_length_swa") or key
        value = header.arch_number("attention.value_length_swa") or value
    return (key, value) if heads else (0, 0)


def _kv_heads(header: GgufHeader, count: int) -> list[int]:
    """Return the heads with keys and values for each layer."""
    key = "attention.head_count_kv"
    if f"{header.architecture}.{key}" in header.metadata:
        return per_layer(header, key, 0, count)
    return per_layer(header, "attention.head_count", 0, count)


def _recurrent_layers(header: GgufHeader, heads: list[int]) -> list[bool]:
    """Tell for each layer whether it has a state."""
    architecture, count = header.architecture, len(heads)
    if architecture in _RECURRENT or architecture in _BOTH_EVERYWHERE:
        return [True] * count
    if architecture in _BY_HEADS:
        return [not kv_heads for kv_heads in heads]
    if architecture in _BY_HEADS_AND_WIDTH:
        widths = per_layer(header, "feed_forward_length", 0, count)
        return [not kv_heads and not width for kv_heads, width in zip(heads, widths, strict=True)]
    if architecture in _INTERVALS:
        stated = f"{architecture}.attention.recurrent_layers"
        if stated in header.metadata:
            return [bool(flag) for flag in per_layer(header, "attention.recurrent_layers", 0, count)]
        interval = header.arch_number("full_attention_interval") or _INTERVALS[architecture]
        return [(layer + 1) % interval != 0 for layer in range(count)]
    return [False] * count


def _attends(header: GgufHeader, layer: int, heads: list[int], recurrent: list[bool]) -> bool:
    architecture = header.architecture
    if architecture in _RECURRENT or not heads[layer]:
        return False
    return architecture in _BOTH_EVERYWHERE or not recurrent[layer]


def _layers_with_own_keys(header: GgufHeader, count: int) -> int:
    if header.architecture == "gemma3n":
        return _GEMMA3N_OWN_LAYERS
    return count - min(header.arch_number("attention.shared_kv_layers"), count)


def _state_items(header: GgufHeader) -> int:
    """Return the numbers that one layer keeps of one sequence: a short convolution's, and a scan's or heads'."""
    width, heads = header.embedding_length, first_number(header, "attention.head_count")
    if head := header.arch_number("wkv.head_size"):
        return width * ((header.arch_number("token_shift_count") or 2) + head)
    inner, state = header.arch_number("ssm.inner_size"), header.arch_number("ssm.state_size")
    kernel, groups = header.arch_number("ssm.conv_kernel"), header.arch_number("ssm.group_count")
    if cached := header.arch_number("shortconv.l_cache"):
        return width * (cached - 1) + state * inner
    if head := header.arch_number("kda.head_dim"):
        return 3 * ((kernel - 1) if kernel else 3) * heads * head + head * head * heads
    convolution = max(kernel - 1, 0) * (inner + 2 * groups * state)
    if header.architecture == "minimax-01":
        head = header.arch_number("attention.key_length") or width // max(heads, 1)
        return convolution + head * head * heads
    return convolution + inner * state
