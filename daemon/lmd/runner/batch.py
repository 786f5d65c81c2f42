"""What one step decodes: some tokens, each of a sequence at a position."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any


class Batch:
    """A `llama_batch` over arrays that are allocated once.

    llama.cpp wants a pointer to a list of sequences for every token; each token here belongs to one, so the pointers
    go into a table of sequence numbers and are written as plain addresses.
    """

    def __init__(self, llama: Any, capacity: int, sequences: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._tokens = (ctypes.c_int32 * capacity)()
        self._positions = (ctypes.c_int32 * capacity)()
        self._counts = (ctypes.c_int32 * capacity)(*([1] * capacity))
        self._outputs = (ctypes.c_int8 * capacity)()
        self._sequences = (ctypes.c_size_t * capacity)()
        self._table = (ctypes.c_int32 * sequences)(*range(sequences))
        table = ctypes.addressof(self._table)
        self._addresses = [table + index * ctypes.sizeof(ctypes.c_int32) for index in range(sequences)]
        int32_p = ctypes.POINTER(ctypes.c_int32)
        self.native = llama.llama_batch()
        self.native.token = ctypes.cast(self._tokens, int32_p)
        self.native.pos = ctypes.cast(self._positions, int32_p)
        self.native.n_seq_id = ctypes.cast(self._counts, int32_p)
        self.native.seq_id = ctypes.cast(self._sequences, ctypes.POINTER(int32_p))
        self.native.logits = ctypes.cast(self._outputs, ctypes.POINTER(ctypes.c_int8))

    def clear(self) -> None:
        """Empty it."""
        self.size = 0

    def add(self, token: int, position: int, sequence: int) -> int:
        """Add one token that the next one is sampled after; return its index."""
        index = self.size
        self._tokens[index] = token
        self._positions[index] = position
        self._sequences[index] = self._addresses[sequence]
        self._outputs[index] = 1
        self.size = index + 1
        return index

    def add_chunk(self, tokens: array[int], position: int, sequence: int, *, sample: bool) -> int:
        """Add tokens from *position* on; with *sample* the next one is sampled after the last. Return its index."""
        start, count = self.size, len(tokens)
        end = start + count
        self._tokens[start:end] = tokens
        self._positions[start:end] = range(position, position + count)
        self._sequences[start:end] = [self._addresses[sequence]] * count
        ctypes.memset(ctypes.addressof(self._outputs) + start, 0, count)
        self._outputs[end - 1] = int(sample)
        self.size = end
        return end - 1

    def finish(self) -> Any:
        """Return the structure to decode."""
        self.native.n_tokens = self.size
        return self.native
