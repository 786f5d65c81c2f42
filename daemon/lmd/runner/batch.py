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
        tokens = (ctypes.c_int32 * capacity)()
        positions = (ctypes.c_int32 * capacity)()
        counts = (ctypes.c_int32 * capacity)(*([1] * capacity))
        outputs = (ctypes.c_int8 * capacity)()
        pointers = (ctypes.c_uint64 * capacity)()
        self._table = (ctypes.c_int32 * sequences)(*range(sequences))
        table = ctypes.addressof(self._table)
        self._addresses = [table + index * ctypes.sizeof(ctypes.c_int32) for index in range(sequences)]
        # Views copy whole arrays at once and keep the memory behind them alive.
        self._tokens = memoryview(tokens).cast("B").cast("i")
        self._positions = memoryview(positions).cast("B").cast("i")
        self._outputs = memoryview(outputs).cast("B").cast("b")
        self._pointers = memoryview(pointers).cast("B").cast("Q")
        self._counts = counts
        int32_p = ctypes.POINTER(ctypes.c_int32)
        self.native = llama.llama_batch()
        self.native.token = ctypes.cast(tokens, int32_p)
        self.native.pos = ctypes.cast(positions, int32_p)
        self.native.n_seq_id = ctypes.cast(counts, int32_p)
        self.native.seq_id = ctypes.cast(pointers, ctypes.POINTER(int32_p))
        self.native.logits = ctypes.cast(outputs, ctypes.POINTER(ctypes.c_int8))

    def clear(self) -> None:
        """Empty it."""
        self.size = 0

    def add(self, token: int, position: int, sequence: int) -> int:
        """Add one token that the next one is sampled after; return its index."""
        index = self.size
        self._tokens[index] = token
        self._positions[index] = position
        self._pointers[index] = self._addresses[sequence]
        self._outputs[index] = 1
        self.size = index + 1
        return index

    def add_chunk(self, tokens: array[int], position: int, sequence: int, *, sample: bool) -> int:
        """Add tokens from *position* on; with *sample* the next one is sampled after the last. Return its index."""
        start, count = self.size, len(tokens)
        end = start + count
        self._tokens[start:end] = tokens
        self._positions[start:end] = array("i", range(position, position + count))
        self._pointers[start:end] = array("Q", [self._addresses[sequence]]) * count
        self._outputs[start:end] = array("b", bytes(count))
        self._outputs[end - 1] = int(sample)
        self.size = end
        return end - 1

    def add_embedded(self, tokens: array[int], position: int, sequence: int) -> None:
        """Add tokens from *position* on that all count for the vector of their sequence."""
        start = self.size
        self.add_chunk(tokens, position, sequence, sample=True)
        self._outputs[start : self.size] = array("b", b"\x01" * len(tokens))

    def finish(self) -> Any:
        """Return the structure to decode."""
        self.native.n_tokens = self.size
        return self.native
