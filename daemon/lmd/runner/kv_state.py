"""The state of one sequence as bytes: out of the engine's memory, and back into it.

What holds for `llama_state_seq_*` (llama-cpp-python 0.3.36), read in its source and kept by tests: a state holds the
cells of one sequence, also those that it shares with others, and nothing of the others; it goes into any free cells of
a memory that holds other sequences, and replaces what its sequence held. It belongs to the model, the types of the
cache, whether V is transposed (it is without flash attention) and the size of the context, from which some models
choose how they rotate positions. A sliding window leaves out what it has passed; a recurrent state is one row. Only the
first *n* tokens of a sequence are saved by copying those to another sequence first, which in a unified cache moves no
data.

A sequence whose positions were shifted must be decoded once before it is saved: the engine turns its keys only then.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from typing import Any

from lmd.runner.kv_format import FINGERPRINT_BYTES


class SequenceState:
    """Saves and restores sequences of one context. Not thread-safe."""

    def __init__(self, llama: Any, context: Any) -> None:
        self._llama = llama
        self._context = context
        self._memory = llama.llama_get_memory(context)

    def size(self, sequence: int) -> int:
        """Return the bytes of a sequence's state as it is now; 0 when the engine cannot tell."""
        return int(self._llama.llama_state_seq_get_size(self._context, sequence))

    def save(self, sequence: int, length: int, into: memoryview) -> bool:
        """Write the state of a sequence of *length* tokens into a buffer of exactly its size; say whether it is there.

        It is not when the sequence does not hold what the caller believes.
        """
        if self._last(sequence) != length - 1 or self.size(sequence) != len(into):
            return False
        written = self._llama.llama_state_seq_get_data(self._context, _address(into), len(into), sequence)
        return int(written) == len(into)

    def restore(self, sequence: int, state: memoryview, length: int) -> bool:
        """Put a state of *length* tokens into a sequence, in place of what that held; leave it empty on failure.

        It fails when the memory has too few free cells, or the state is not one of this context.
        """
        read = int(self._llama.llama_state_seq_set_data(self._context, _address(state), len(state), sequence))
        # The engine is not trusted to have done what it says: as many cells, up to the same position.
        if read == len(state) and self._last(sequence) == length - 1 and self.size(sequence) == len(state):
            return True
        self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return False

    def _last(self, sequence: int) -> int:
        return int(self._llama.llama_memory_seq_pos_max(self._memory, sequence))


def fingerprint(llama: Any, native: Any, context: Any, engine_version: str, **settings: object) -> bytes:
    """Return what stands for all that must be equal for a state to be of use to a context.

    *settings* are those of the context that the engine does not tell afterwards: the types of the cache, flash
    attention. The manifest is not part of it: its directory is. The total context is, not only that of a sequence,
    because some models choose their rotation by it; and so is what the engine was built for, since kernels differ.
    """
    facts = {
        "engine": engine_version,
        "system": llama.llama_print_system_info(),
        "byte order": sys.byteorder,
        "context": (llama.llama_n_ctx(context), llama.llama_n_ctx_seq(context)),
        "model": [
            getattr(llama, f"llama_model_{fact}")(native)
            for fact in ("size", "n_params", "n_layer", "n_embd", "n_head_kv", "n_swa", "is_recurrent", "is_hybrid")
        ],
        "settings": sorted((name, str(value)) for name, value in settings.items()),
    }
    return hashlib.blake2b(repr(facts).encode(), digest_size=FINGERPRINT_BYTES).digest()


def _address(view: memoryview) -> Any:
    """Return a reference to a writable buffer; one made by `cast` would hold the buffer until garbage is collected."""
    return ctypes.byref(ctypes.c_uint8.from_buffer(view))
