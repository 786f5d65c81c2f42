"""How much memory a model will take, from its header alone.

Weights, keys, values and recurrent state are exact: as many bytes as the engine allocates with the context that the
runner makes (`lmd.runner.model`, `lmd.runner.embedding_context`, `lmd.runner.draft`). Scratch memory is a close
formula. Once a runner has loaded the model, what it measured replaces these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmd.registry.capabilities import EMBEDDING_ARCHITECTURES, is_embedding
from lmd.registry.gguf import GgufHeader, combine
from lmd.registry.kv_types import DEFAULT_KV_TYPE, is_quantized, kv_type_bytes
from lmd.registry.memory.compute import CELL_PADDING, Context, compute_bytes, has_small_scores, has_wide_weights, padded
from lmd.registry.memory.layers import LayerKind, Layers, read_layers
from lmd.registry.memory.values import LayerMemory, MemoryEstimate
from lmd.registry.memory.weights import split_weights

DEFAULT_BATCH = 512
STATE_ITEM_BYTES = 4
"""Recurrent state is kept as F32."""
CACHED_SEQUENCES = 28
"""Sequences of prefix cache beside those of the slots, where they cost nothing."""
EMBEDDING_SEQUENCES = 64
"""Texts that share a step when they are embedded."""
EMBEDDING_BATCH = 512
_LEAST_EMBEDDING_BATCH = 32
_EMBEDDING_SCORES_BYTES = 128 * 1024**2


def estimate(
    header: GgufHeader | Sequence[GgufHeader],
    *,
    num_ctx: int,
    slots: int,
    num_batch: int = DEFAULT_BATCH,
    kv_type: str = DEFAULT_KV_TYPE,
    drafts: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of a model whose *slots* sequences have *num_ctx* tokens of context each.

    *header* is the model's, or those of all its files in order. A model is never given more context than it was trained
    for. With *drafts* it drafts for another one, with one sequence.

        kv_bytes = sum over attention layers of cells * head_count_kv * (key_length + value_length) * bytes a number
        cells    = num_ctx * slots, rounded up to 256
                   a layer with a window: window * slots + num_batch, rounded up to 256, no more than that

    with ``{arch}.attention.head_count_kv`` (one number, or one for each layer; default ``head_count``) and
    ``{arch}.attention.key_length`` and ``value_length`` (default ``embedding_length / head_count``); recurrent layers
    have a state for each slot instead.

    A model that only embeds or ranks reads one text of *num_ctx* tokens at most. An encoder keeps nothing of it but
    needs the whole text in one graph, with a row of scores for each token.
    """
    whole = header if isinstance(header, GgufHeader) else combine(header)
    layers = read_layers(whole)
    if whole.context_length:
        num_ctx = min(num_ctx, whole.context_length)
    if is_embedding(whole) and not drafts:
        context = _embedding_context(whole, layers, num_ctx, kv_type)
    else:
        context = _context(whole, layers, num_ctx, slots, num_batch, kv_type, drafts=drafts)
    states = context.sequences if layers.has_state else 0
    kept = [_kv_bytes(kind, context, kv_type, states) for kind in layers.kinds]
    weights = split_weights(whole)
    return MemoryEstimate(
        weights_bytes=weights.total_bytes,
        kv_bytes=sum(kept),
        compute_bytes=compute_bytes(whole, layers, context),
        layers=tuple(map(LayerMemory, weights.layers, kept)),
        input_bytes=weights.input_bytes,
        output_bytes=weights.output_bytes,
        active_bytes=weights.active_bytes,
    )


def _context(
    header: GgufHeader, layers: Layers, num_ctx: int, slots: int, num_batch: int, kv_type: str, *, drafts: bool
) -> Context:
    """Describe the context that generates."""
    tokens = num_ctx if drafts else num_ctx * slots
    sequences = 1 if drafts else slots if layers.each_sequence_costs else slots + CACHED_SEQUENCES
    step = max(num_batch, slots)
    cells = padded(tokens, CELL_PADDING)
    # The engine takes no larger step than the context.
    in_step = min(step, tokens)
    may_be_plain = not drafts and not is_quantized(kv_type) and has_wide_weights(header)
    return Context(
        cells=cells,
        window_cells=cells if drafts else _window_cells(layers, cells, sequences, in_step),
        sequences=sequences,
        step_tokens=in_step,
        rows=min(in_step, sequences),
        plain=may_be_plain and has_small_scores(header, step_tokens=step, cells=tokens),
    )


def _embedding_context(header: GgufHeader, layers: Layers, text_tokens: int, kv_type: str) -> Context:
    """Describe the context of a model that only embeds."""
    row_bytes = 4 * max(header.vocabulary_size, 1)
    shared = max(_LEAST_EMBEDDING_BATCH, min(EMBEDDING_BATCH, _EMBEDDING_SCORES_BYTES // row_bytes))
    encodes = header.architecture in EMBEDDING_ARCHITECTURES
    whole = encodes or header.metadata.get(f"{header.architecture}.attention.causal") is False
    step = max(shared, text_tokens) if whole else shared
    tokens = max(text_tokens, step)
    cells = padded(tokens, CELL_PADDING)
    in_step = step if whole else min(step, tokens)
    sequences = 1 if layers.has_state else EMBEDDING_SEQUENCES
    return Context(
        cells=cells,
        window_cells=_window_cells(layers, cells, sequences, in_step),
        sequences=sequences,
        step_tokens=in_step,
        rows=in_step,
        plain=not is_quantized(kv_type) and has_small_scores(header, step_tokens=step, cells=tokens),
        embeds=True,
    )


def _window_cells(layers: Layers, cells: int, sequences: int, step_tokens: int) -> int:
    return padded(min(cells, layers.window * sequences + step_tokens), CELL_PADDING)


def _kv_bytes(kind: LayerKind, context: Context, kv_type: str, states: int) -> int:
    cells = context.window_cells if kind.windowed else context.cells
    rows = kv_type_bytes(kind.keys, kv_type) + kv_type_bytes(kind.values, kv_type)
    return cells * rows + kind.state * STATE_ITEM_BYTES * states
