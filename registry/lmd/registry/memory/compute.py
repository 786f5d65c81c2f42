"""How much scratch memory the engine reserves for its graph: what is alive at once at the busiest point of a layer.

The engine lays the results of all operations of a step into one buffer and reuses what nobody needs any more. Nobody
writes down how much that comes to, so this counts what is alive at the points that can be the busiest, in numbers of
32 bits for each token of a step: within attention, within the feed-forward network, among experts, in a recurrent
layer. The small factors are measured: they hold what the allocator wastes. `bench/memory_estimates.py` compares this
with what the engine takes, over all kinds of models; ADR 0017 has the reasons for a formula.

Source: `llama_context::graph_reserve`, `llm_graph_context::build_*` and `ggml-alloc.c` (llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from dataclasses import dataclass

from lmd.registry.capabilities import EMBEDDING_ARCHITECTURES
from lmd.registry.gguf import GgufHeader
from lmd.registry.memory.layers import Layers, read_layers
from lmd.registry.memory.numbers import first_number
from lmd.registry.memory.remembered import once_per_header

NUMBER_BYTES = 4
CELL_PADDING = 256
MAX_PLAIN_SCORES_BYTES = 256 * 1024**2
"""The runner computes attention plainly, on the processor, only while the scores of a step take no more than this."""
_WIDE_BYTES = 3.5


@dataclass(frozen=True, slots=True)
class Context:
    """A context as the runner makes it.

    Attributes:
        cells: tokens that the cache holds, for all sequences together.
        window_cells: those of the cache for layers with a window.
        sequences: the most sequences in it.
        step_tokens: tokens of one step.
        rows: rows of scores that one step can have.
        plain: whether attention is computed in the plain way.
        embeds: whether it embeds texts.
    """

    cells: int
    window_cells: int
    sequences: int
    step_tokens: int
    rows: int
    plain: bool
    embeds: bool = False

    @property
    def planned_tokens(self) -> int:
        """Tokens of the step that memory is reserved for: as many for each sequence."""
        return padded(self.step_tokens, self.sequences)


def padded(number: int, multiple: int) -> int:
    """Round up."""
    return -(-number // multiple) * multiple


def compute_bytes(header: GgufHeader, layers: Layers, context: Context) -> int:
    """Return the bytes of the graph's buffer and of the rows of scores and vectors that come out."""
    tokens, vocabulary = context.planned_tokens, _head_rows(header)
    plain = _plain_scores(header, layers, context) if context.plain else 0
    masks = _masks(layers, context)
    in_layers = masks + tokens * NUMBER_BYTES * _busiest(header) + plain
    rows = vocabulary * context.rows * NUMBER_BYTES
    if context.embeds:
        # All tokens come out, each with its vector and scores that nobody asks for.
        at_the_end = masks + rows + 2 * tokens * NUMBER_BYTES * header.embedding_length
        kept = context.rows * (header.vocabulary_size + header.embedding_length) * NUMBER_BYTES
        return max(in_layers, at_the_end) + kept
    # The scores are computed when the last layer is over, which has been for the rows alone.
    at_the_end = rows + tokens * NUMBER_BYTES * header.embedding_length
    return max(in_layers, at_the_end) + context.sequences * header.vocabulary_size * NUMBER_BYTES


@once_per_header
def has_wide_weights(header: GgufHeader) -> bool:
    """Tell whether weights have 32 bits: for those the runner prefers plain attention to generate with."""
    count = header.parameter_count
    return bool(count) and header.weights_bytes >= _WIDE_BYTES * count


def has_small_scores(header: GgufHeader, *, step_tokens: int, cells: int) -> bool:
    """Tell whether the scores of plain attention are few enough for it."""
    return _scores(header, step_tokens, cells) <= MAX_PLAIN_SCORES_BYTES


def _scores(header: GgufHeader, tokens: int, cells: int) -> int:
    return first_number(header, "attention.head_count") * tokens * cells * NUMBER_BYTES


def _head_rows(header: GgufHeader) -> int:
    """Return the numbers of a row of scores; an encoder computes none."""
    return 0 if header.architecture in EMBEDDING_ARCHITECTURES else header.vocabulary_size


def _masks(layers: Layers, context: Context) -> int:
    """Return the bytes of what says which token sees which."""
    width = NUMBER_BYTES if context.plain else 2
    if not layers.has_cache:
        # An encoder's is among the tokens of the step, and there is another one for layers with a window.
        return context.planned_tokens**2 * width * (2 if layers.window else 1) if context.embeds else 0
    cells = (context.cells if layers.has_full_attention else 0) + (context.window_cells if layers.has_windows else 0)
    return cells * context.planned_tokens * width


def _plain_scores(header: GgufHeader, layers: Layers, context: Context) -> int:
    if not layers.has_cache:
        return _scores(header, context.planned_tokens, context.planned_tokens) if context.embeds else 0
    cells = context.cells if layers.has_full_attention else context.window_cells
    return _scores(header, context.planned_tokens, cells)


@once_per_header
def _busiest(header: GgufHeader) -> int:
    """Return the numbers for each token at the busiest point of a layer."""
    layers = read_layers(header)
    return max(_attention(header, layers), _feed_forward(header), _experts(header), _recurrent(header, layers))


def _attention(header: GgufHeader, layers: Layers) -> int:
    width, heads = header.embedding_length, first_number(header, "attention.head_count")
    latent = header.arch_number("attention.kv_lora_rank")
    mla = header.arch_number("attention.key_length_mla")
    if latent and mla:
        key = header.arch_number("attention.key_length")
        return heads * (2 * latent + key + mla) + 2 * width
    key = header.arch_number("attention.key_length") or (width // heads if heads else 0)
    # What has no cache holds keys and values beside everything else.
    keys = max((kind.keys + kind.values for kind in layers.kinds), default=0) or 2 * heads * key
    return 2 * heads * key + 13 * width // 4 + 2 * keys // 3


def _feed_forward(header: GgufHeader) -> int:
    inner, width = first_number(header, "feed_forward_length"), header.embedding_length
    up = [tensor for tensor in header.tensors if ".ffn_up." in tensor.name]
    if header.tensors and not up:
        # The header of a model of experts states a width that nothing has.
        return 0
    # The gate can be in the same matrix.
    fused = any(tensor.shape[-1] > inner for tensor in up)
    gated = not up or fused or any(".ffn_gate." in tensor.name for tensor in header.tensors)
    return (3 * inner if gated else inner) + 7 * width // 2


def _experts(header: GgufHeader) -> int:
    used, width = first_number(header, "expert_used_count"), header.embedding_length
    if not used or not header.arch_number("expert_count"):
        return 0
    inner = first_number(header, "expert_feed_forward_length") or first_number(header, "feed_forward_length")
    return max(3 * used * inner + 4 * width, 2 * used * width + 2 * width)


def _recurrent(header: GgufHeader, layers: Layers) -> int:
    if not layers.has_state:
        return 0
    inner, state = header.arch_number("ssm.inner_size"), header.arch_number("ssm.state_size")
    channels = inner + 2 * header.arch_number("ssm.group_count") * state
    if header.arch_number("wkv.head_size"):
        return 10 * header.embedding_length
    return 3 * inner + 2 * channels + 4 * header.embedding_length
