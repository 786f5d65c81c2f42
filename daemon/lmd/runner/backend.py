"""llama.cpp as the engine sees it: typed and thin, over the low-level bindings."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

from lmd.runner.adapters import Scales
from lmd.runner.kv_state import SequenceState
from lmd.runner.model import Model
from lmd.runner.sampling import Sampler
from lmd.runner.seams import SequenceStates, TokenSampler
from lmd.runner.v1 import frames_pb2

_IDLE_TOKENS = 512
# A copy out of memory costs 22 us a token, and a look at it in place 0.4 us for each row (0.4 B on two cores,
# measured). Waiting for twice that spares the copy where a chat goes on at once, or answers end one after the other.
_IDLE_ROWS = 128


class LlamaBackend:
    """llama.cpp, through its low-level bindings."""

    def __init__(self, model: Model) -> None:
        self._llama = model.llama
        self._context = model.context
        self._vocab = model.vocab
        self._adapters = model.adapters
        self._scales: Scales | None = None
        self.batch = model.batch
        self.memory = model.memory
        self.num_ctx = model.num_ctx
        self.slots = model.slots
        self.sequences = model.sequences
        self.cells = model.num_ctx * model.slots
        self.rows = model.rows
        # On an accelerator one pass over the weights does for both. On a CPU a prompt keeps the processors busy by
        # itself, and with rows of other sequences in its batch its attention goes over their cells, too: seven answers
        # add 100 ms to 128 tokens of a prompt, and take 55 ms by themselves (0.4 B on two cores, measured).
        self.mixes = not model.on_cpu
        # Accelerators skip what is masked, and their memory is what there is least of; so there, only a lack of cells
        # moves prefixes out. On a CPU each step looks at every cell in use, masked or not: 512 of them slow one answer
        # by 2 %, and reading a prompt by 6 % (0.4 B on two cores, measured).
        self.idle_tokens = _IDLE_TOKENS if model.on_cpu else self.cells
        self.idle_rows = _IDLE_ROWS
        self.states: SequenceStates | None = SequenceState(model.llama, model.context) if model.parked_bytes else None
        self.parked_bytes = model.parked_bytes

    def adapt(self, scales: Scales | None) -> None:
        """Decode with these scales of adapters from now on."""
        if scales != self._scales:
            self._adapters.apply(self._context, scales)
            self._scales = scales

    def decode(self) -> int:
        """Decode the batch."""
        code: int = self._llama.llama_decode(self._context, self.batch.finish())
        return code

    def sampler(self, sampling: frames_pb2.Sampling, prompt: array[int], *, seed: int) -> TokenSampler:
        """Return a sampler that has seen *prompt*."""
        sampler = Sampler(self._llama, self._vocab, sampling, num_ctx=self.num_ctx, prompt=prompt, seed=seed)
        return _ContextSampler(sampler, self._context)

    def logits(self, row: int) -> int:
        """Return the address of a row's scores."""
        pointer = self._llama.llama_get_logits_ith(self._context, row)
        return ctypes.cast(pointer, ctypes.c_void_p).value or 0


class _ContextSampler:
    """A sampler with the context whose rows it reads."""

    def __init__(self, sampler: Sampler, context: Any) -> None:
        self._sampler = sampler
        self._context = context

    def sample(self, row: int) -> int:
        return self._sampler.sample(self._context, row)

    def free(self) -> None:
        self._sampler.free()
