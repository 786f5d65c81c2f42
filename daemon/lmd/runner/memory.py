"""The KV cache and recurrent state of a context: one row of positions for every sequence.

Three kinds behave differently, and only what is certain to be right is offered for reuse:

- plain attention: any beginning of any sequence can be kept or copied;
- sliding-window attention: positions that left the window are gone, so a beginning can be kept only when the window
  before its end is still there;
- recurrent state: the state after the last token is all there is; a sequence can be continued, never cut or copied.
"""

from __future__ import annotations

from typing import Any


class Memory:
    """Sequences in the memory of one context. Not thread-safe.

    Attributes:
        shares_freely: whether any beginning can be copied at any time.
        can_shift: whether positions can be moved.
    """

    def __init__(self, llama: Any, context: Any, model: Any, *, may_shift: bool = True) -> None:
        """Look at the memory of *context*; positions are never moved unless *may_shift*."""
        self._llama = llama
        self._memory = llama.llama_get_memory(context)
        self._window = int(llama.llama_model_n_swa(model))
        self._recurrent = bool(llama.llama_model_is_recurrent(model) or llama.llama_model_is_hybrid(model))
        self.shares_freely = not self._recurrent and not self._window
        self.can_shift = may_shift and self.shares_freely and bool(llama.llama_memory_can_shift(self._memory))

    def reusable(self, sequence: int, length: int, shared: int, *, idle: bool) -> int:
        """Return how many of the *shared* first positions of a sequence of *length* another prompt can start from.

        *idle* says that nobody uses the sequence, so that it can be continued itself.
        """
        if shared <= 0:
            return 0
        if self._recurrent:
            return shared if idle and shared == length else 0
        if self._window:
            oldest = self._llama.llama_memory_seq_pos_min(self._memory, sequence)
            if oldest > max(0, shared - self._window):
                return 0
        return shared

    def keep(self, sequence: int, length: int) -> bool:
        """Drop all but the first *length* positions; on failure drop all and return false."""
        self._llama.llama_memory_seq_rm(self._memory, sequence, length, -1)
        return self._has(sequence, length)

    def copy(self, source: int, target: int, length: int) -> bool:
        """Give *target*, and nothing else to it, the first *length* positions of *source*; on failure leave it empty.

        In a unified cache this marks the rows as shared; no data moves, also while *source* is in use.
        """
        self.clear(target)
        self._llama.llama_memory_seq_cp(self._memory, source, target, 0, length)
        return self._has(target, length)

    def extend(self, source: int, target: int, begin: int, end: int) -> bool:
        """Give *target* the positions of *source* from *begin* to *end*, as `copy` does; it holds those before already.

        Where a sequence is a part of another one, *target* may hold nothing yet. On failure it is empty.
        """
        self._llama.llama_memory_seq_cp(self._memory, source, target, begin, end)
        return self._has(target, end)

    def shift(self, sequence: int, keep: int, discard: int) -> bool:
        """Drop *discard* positions after the first *keep* and move up what follows; on failure drop all.

        The cells that move must be this sequence's alone: a cell has one position, whoever shares it.
        """
        length = self._llama.llama_memory_seq_pos_max(self._memory, sequence) + 1
        self._llama.llama_memory_seq_rm(self._memory, sequence, keep, keep + discard)
        self._llama.llama_memory_seq_add(self._memory, sequence, keep + discard, -1, -discard)
        return self._has(sequence, length - discard)

    def clear(self, sequence: int) -> None:
        """Drop a sequence."""
        self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def clear_all(self) -> None:
        """Drop everything."""
        self._llama.llama_memory_clear(self._memory, False)

    def _has(self, sequence: int, length: int) -> bool:
        """Check that a sequence ends where it should: the engine is not trusted to have done what it was asked."""
        if self._llama.llama_memory_seq_pos_max(self._memory, sequence) == length - 1:
            return True
        self.clear(sequence)
        return False
