"""How much memory a model will take, from its header alone: before it is loaded, or even pulled.

The weights are exact. The rest errs on the large side: sliding-window layers count as full attention, a layer that may
have both attention and recurrent state counts both, and flash attention is assumed. Once a runner has loaded the model,
what it measured replaces these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmd.registry.capabilities import EMBEDDING_ARCHITECTURES, is_embedding
from lmd.registry.gguf import GgufArray, GgufHeader, combine
from lmd.registry.memory_weights import split_weights

KV_ITEM_BYTES = 2
"""Keys and values are kept as F16."""
STATE_ITEM_BYTES = 4
"""Recurrent state is kept as F32."""
CELL_PADDING = 256
"""The engine rounds the context up to this many cells."""
MAX_UBATCH = 512
"""The engine's default for tokens per graph, whatever the batch."""
COMPUTE_FLOOR_BYTES = 16 * 1024**2
PLAIN_SCORES_BYTES = 256 * 1024**2
"""The runner computes attention plainly while the scores of a batch take no more than this."""


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one repeating layer takes wherever it is placed: its weights, and its keys, values and recurrent state."""

    weights_bytes: int
    kv_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.weights_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by what they are for, and by what can be placed apart.

    Attributes:
        weights_bytes: all tensors of the files, each once.
        kv_bytes: keys, values and recurrent state of all layers.
        compute_bytes: scratch memory of the graph, and rows of scores; what the busiest single device needs.
        layers: the repeating layers in order; `num_gpu` counts them from the end.
        input_bytes: the token embedding and what belongs to it: it stays in main memory.
        output_bytes: the last norm and the head: the one layer that `num_gpu` counts beside the repeating ones, and
            the first to be placed. Where the head is the token embedding (tied), an accelerator gets a copy of it, so
            that input, layers and output can add up to more than *weights_bytes*.
        active_bytes: weights that are read for a token: of a mixture of experts, those that are used.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    layers: tuple[LayerMemory, ...] = ()
    input_bytes: int = 0
    output_bytes: int = 0
    active_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it, on one device that reads the weights where they are."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


def estimate(
    header: GgufHeader | Sequence[GgufHeader], *, num_ctx: int, slots: int, num_batch: int = MAX_UBATCH
) -> MemoryEstimate:
    """Estimate the memory of a model whose *slots* sequences have *num_ctx* tokens of context each.

    *header* is the model's, or those of all its files in order.

        kv_bytes = cells * sum over attention layers of head_count_kv * (key_length + value_length) * 2
        cells    = num_ctx * slots, rounded up to 256

    with ``{arch}.attention.head_count_kv`` (one number, or one for each layer; default ``head_count``) and
    ``{arch}.attention.key_length`` and ``value_length`` (default ``embedding_length / head_count``).

    A model that only embeds or ranks reads one text of *num_ctx* tokens at most. An encoder keeps nothing of it but
    needs the whole text in one graph, with a row of logits for each token.

    Source: ``llama-kv-cache.cpp`` and ``llama-hparams.cpp`` of llama.cpp (mid 2026).
    """
    whole = header if isinstance(header, GgufHeader) else combine(header)
    if is_embedding(whole):
        return _estimate_embedding(whole, max(num_ctx, MAX_UBATCH))
    cells = -(-num_ctx * slots // CELL_PADDING) * CELL_PADDING
    return _estimate(whole, cells, slots, _compute_bytes(whole, cells, min(num_batch, MAX_UBATCH)))


def _estimate(header: GgufHeader, cells: int, sequences: int, compute_bytes: int) -> MemoryEstimate:
    kv_bytes = _kv_bytes(header, cells, sequences)
    weights = split_weights(header)
    return MemoryEstimate(
        weights_bytes=header.weights_bytes,
        kv_bytes=sum(kv_bytes),
        compute_bytes=compute_bytes,
        layers=tuple(map(LayerMemory, weights.layers, kv_bytes)),
        input_bytes=weights.input_bytes,
        output_bytes=weights.output_bytes,
        active_bytes=weights.active_bytes,
    )


def _estimate_embedding(header: GgufHeader, text_tokens: int) -> MemoryEstimate:
    cells = -(-text_tokens // CELL_PADDING) * CELL_PADDING
    encodes = header.architecture in EMBEDDING_ARCHITECTURES
    in_pieces = not encodes and header.metadata.get(f"{header.architecture}.attention.causal") is not False
    batch = MAX_UBATCH if in_pieces else text_tokens
    scores_bytes = 4 * header.arch_number("attention.head_count") * batch * cells
    compute_bytes = _compute_bytes(header, cells, batch) + min(scores_bytes, PLAIN_SCORES_BYTES)
    return _estimate(header, 0 if encodes else cells, 0 if encodes else 1, compute_bytes)


def _kv_bytes(header: GgufHeader, cells: int, sequences: int) -> list[int]:
    """Keys, values and recurrent state for each layer."""
    heads = max(header.arch_number("attention.head_count"), 1)
    default_length = header.embedding_length // heads
    key_length = header.arch_number("attention.key_length") or default_length
    value_length = header.arch_number("attention.value_length") or default_length
    cell_bytes = (key_length + value_length) * KV_ITEM_BYTES
    state_bytes = _state_bytes(header) * sequences
    return [count * cell_bytes * cells + state_bytes for count in _kv_heads(header)]


def _kv_heads(header: GgufHeader) -> list[int]:
    """Heads with keys and values for each layer; 0 for layers without attention."""
    layers = min(header.block_count, 4096)
    value = header.metadata.get(f"{header.architecture}.attention.head_count_kv")
    if isinstance(value, GgufArray):
        counts = [int(item) for item in value.values if isinstance(item, int) and item >= 0][:layers]
        # An array that is too short, or too long to be kept whole, is made up for with its largest count.
        counts += [max(counts, default=0)] * (layers - len(counts))
    elif value is None:
        counts = [header.arch_number("attention.head_count")] * layers
    else:
        counts = [header.arch_number("attention.head_count_kv")] * layers
    # Hybrids such as Qwen3-Next have attention in every n-th layer only, though they state heads for all.
    interval = header.arch_number("full_attention_interval")
    if interval > 1:
        counts = [count if (layer + 1) % interval == 0 else 0 for layer, count in enumerate(counts)]
    return counts


def _state_bytes(header: GgufHeader) -> int:
    """Recurrent state of one layer and sequence (Mamba's convolution and scan, RWKV's token shift and heads)."""
    inner = header.arch_number("ssm.inner_size")
    state = header.arch_number("ssm.state_size")
    groups = header.arch_number("ssm.group_count")
    kernel = header.arch_number("ssm.conv_kernel")
    mamba_items = max(kernel - 1, 0) * (inner + 2 * groups * state) + inner * state
    head = header.arch_number("wkv.head_size")
    shifts = header.arch_number("token_shift_count") or 2
    rwkv_items = header.embedding_length * (shifts + head) if head else 0
    return (mamba_items + rwkv_items) * STATE_ITEM_BYTES


def _compute_bytes(header: GgufHeader, cells: int, ubatch: int) -> int:
    """The graph's scratch memory: activations of one micro-batch, its logits and the attention mask."""
    feed_forward = header.arch_number("feed_forward_length") or 4 * header.embedding_length
    active_experts = max(header.arch_number("expert_used_count"), 1)
    expert_width = header.arch_number("expert_feed_forward_length")
    widest = max(feed_forward, expert_width * active_experts)
    activations = ubatch * 4 * (header.vocabulary_size + 3 * widest + 8 * header.embedding_length)
    mask = ubatch * cells * (4 + 2)
    return COMPUTE_FLOOR_BYTES + activations + mask
