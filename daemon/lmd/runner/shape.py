"""What a loaded model's shape means for the context that is made for it."""

from __future__ import annotations

from typing import Any

from lmd.runner.embedding_context import metadata

# Scores of plain attention that may take memory: one for each head, token of a step and token of context. On the CPU
# plain attention is exact to the order of its sums, whatever else is in the batch, where flash attention rounds every
# sum to 16 bits. That is worth its price for weights of 32 bits, whose answers are then the same alone and in company;
# narrower weights round differently by batch size anyway. Flash attention suffers half as much from the cells of other
# sequences: 2.8 instead of 5.4 ms a token for the eighth prompt of 256 (measured). Beyond this size its memory is the
# stronger argument, too.
_PLAIN_SCORES_BYTES = 256 << 20
_SCORE_BYTES = 4
# Bytes a weight, from which on nearly all of them have 32 bits.
_WIDE_BYTES = 3.5


class Shape:
    """A model's shape. `lmd.registry.memory` reckons with the same rules before a model is loaded.

    Attributes:
        heads: those of a layer.
        key_length: numbers of a key.
        sequences_are_free: whether further sequences cost nothing; recurrent state and windows take memory for each.
    """

    def __init__(self, llama: Any, native: Any) -> None:
        self.heads = int(llama.llama_model_n_head(native))
        stated = metadata(llama, native, "attention.key_length")
        self.key_length = (
            int(stated) if stated.isdigit() else int(llama.llama_model_n_embd(native)) // max(self.heads, 1)
        )
        self.sequences_are_free = not (
            llama.llama_model_n_swa(native)
            or llama.llama_model_is_recurrent(native)
            or llama.llama_model_is_hybrid(native)
        )
        size_bytes, weights = llama.llama_model_size(native), llama.llama_model_n_params(native)
        self._has_wide_weights = bool(size_bytes >= _WIDE_BYTES * weights)

    def is_worth_plain(self, step_tokens: int, cells: int) -> bool:
        """Tell whether plain attention is worth its price for full steps at the end of a full context."""
        return self._has_wide_weights and self.heads * step_tokens * cells * _SCORE_BYTES <= _PLAIN_SCORES_BYTES
