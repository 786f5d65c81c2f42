"""The context that embeds: a second one beside that which generates, or the only one of a model made for embedding.

llama.cpp pools while it decodes: a batch yields one vector for each sequence in it. Three facts shape what may go
into a batch (llama.cpp of llama-cpp-python 0.3.36, `llama-context.cpp`):

- Without causal attention every token sees all others, so a text has to be decoded whole, in one micro-batch. The
  engine asserts that, and an assertion ends the process.
- With it, a text can be decoded in pieces. The pooled vector then is that of the last piece, so the mean over the text
  has to be put together from the means of its pieces.
- Logits are kept for every token of a batch, though nobody asks for them: 4 bytes for each token of the vocabulary.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from lmd.runner.batch import Batch
from lmd.runner.kv_types import is_quantized, set_kv_type

#: Texts that share a batch.
_SEQUENCES = 64
#: Tokens of a batch of several texts, and of a piece of a long one. More gains nothing on a CPU.
BATCH_TOKENS = 512
#: What the logits that nobody asks for may take in such a batch.
_LOGITS_BYTES = 128 << 20
_LOGIT_BYTES = 4
_MIN_BATCH_TOKENS = 32
# As for the context that generates: on the CPU plain attention is exact to the order of its sums.
_PLAIN_SCORES_BYTES = 256 << 20
_META_BYTES = 64

#: The engine's code for a batch that was interrupted.
INTERRUPTED = 2
_LOOK_INTERVAL_S = 0.2


class Pooling(IntEnum):
    """How the vectors of tokens become one; the values are llama.cpp's."""

    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4

    @property
    def text(self) -> str:
        """Its name in frames."""
        return self.name.lower()


def metadata(llama: Any, native: Any, key: str) -> str:
    """Return a scalar of the header as text, "" when it is not there. *key* follows the name of the architecture."""
    buffer = ctypes.create_string_buffer(_META_BYTES)

    def read(name: str) -> str:
        size = llama.llama_model_meta_val_str(native, name.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if size >= 0 else ""

    return read(f"{read('general.architecture')}.{key}")


def header_pooling(llama: Any, native: Any) -> Pooling | None:
    """Return the pooling that the header asks for, None when it asks for none."""
    text = metadata(llama, native, "pooling_type")
    return Pooling(int(text)) if text.isdigit() and int(text) in set(Pooling) else None


@dataclass(frozen=True, slots=True)
class ContextShape:
    """What an embedding context is made for.

    Attributes:
        text_tokens: tokens of the longest text.
        threads: threads of a batch.
        plain: whether attention may be computed plainly, given enough memory.
        kv_type: the type of keys and values; "" is the usual one.
    """

    text_tokens: int
    threads: int
    plain: bool
    kv_type: str = ""


class ContextError(Exception):
    """Raised when the engine makes no context."""


class EmbeddingContext:
    """A context that turns batches of texts into vectors. Not thread-safe.

    Attributes:
        whole: whether a text must be decoded in one piece.
        pooling: how it pools.
        length: numbers of a vector; of a score, when it ranks.
        sequences: texts that may share a batch.
        batch: to be filled by the owner.
        text_tokens: tokens of the longest text.
        rows_bytes: what the scores and vectors of a full batch take.
    """

    def __init__(
        self,
        llama: Any,
        native: Any,
        shape: ContextShape,
        pooling: Pooling,
        *,
        vocab_size: int,
        on_remake: Callable[[], None] | None = None,
    ) -> None:
        """Make it; *on_remake* is called when a first try was freed to make a larger one.

        Raises:
            ContextError: the engine refuses, most likely for want of memory.
        """
        self._llama = llama
        self._native = native
        self._shape = shape
        # Recurrent state takes memory for each sequence there may be, and such texts are read one by one anyway.
        states = llama.llama_model_is_recurrent(native) or llama.llama_model_is_hybrid(native)
        self.sequences = 1 if states else _SEQUENCES
        # The engine keeps the pointer, so the callback lives as long as the context.
        self._abort = llama.ggml_abort_callback(self._look)
        self._interrupt: Callable[[], bool] | None = None
        self._look_at = 0.0
        self._error: BaseException | None = None
        self.text_tokens = shape.text_tokens
        self.pooling = pooling
        per_batch = max(_MIN_BATCH_TOKENS, min(BATCH_TOKENS, _LOGITS_BYTES // (_LOGIT_BYTES * max(vocab_size, 1))))
        #: Tokens that texts may fill a batch with together.
        self.shared_tokens = per_batch
        self.whole = metadata(llama, native, "attention.causal") == "false"
        self.context = self._make(max(per_batch, shape.text_tokens) if self.whole else per_batch)
        memory = llama.llama_get_memory(self.context)
        if not self.whole and not (memory and llama.llama_get_causal_attn(self.context)):
            # The header says nothing about it, but the architecture is one without causal attention.
            self.whole = True
            if shape.text_tokens > per_batch:
                self.close()
                if on_remake is not None:
                    on_remake()
                self.context = self._make(shape.text_tokens)
                memory = llama.llama_get_memory(self.context)
        self._memory = memory
        self.length = int(llama.llama_model_n_embd_out(native))
        batch_tokens = max(per_batch, shape.text_tokens) if self.whole else per_batch
        self.rows_bytes = batch_tokens * (vocab_size + self.length) * _LOGIT_BYTES
        self.batch = Batch(llama, batch_tokens, self.sequences)

    def decode(self, interrupt: Callable[[], bool] | None = None) -> int:
        """Decode the batch; return the engine's code, 0 for success.

        *interrupt* is called a few times a second meanwhile, and returning true makes the code `INTERRUPTED`; what it
        raises comes out here. Accelerators do not call it: their batches are short.
        """
        llama, batch = self._llama, self.batch.finish()
        self._interrupt, self._look_at = interrupt, time.monotonic() + _LOOK_INTERVAL_S
        try:
            code = (llama.llama_decode if self._memory else llama.llama_encode)(self.context, batch)
        finally:
            self._interrupt = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return int(code)

    def _look(self, _user_data: object) -> bool:
        """Tell the engine whether to stop; it asks before every operation."""
        if self._interrupt is None or time.monotonic() < self._look_at:
            return False
        try:
            stop = self._interrupt()
        except BaseException as error:  # nothing can be raised through the engine
            self._error = error
            return True
        self._look_at = time.monotonic() + _LOOK_INTERVAL_S
        return stop

    def vector(self, sequence: int) -> array[float]:
        """Return what the last batch yielded for a sequence: a vector, or one score; empty when there is none."""
        found = array("f")
        pointer = self._llama.llama_get_embeddings_seq(self.context, sequence)
        if pointer:
            count = 1 if self.pooling is Pooling.RANK else self.length
            found.frombytes(ctypes.string_at(pointer, count * found.itemsize))
        return found

    def clear(self) -> None:
        """Forget all texts."""
        if self._memory:
            self._llama.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Free it."""
        self._llama.llama_free(self.context)

    def _make(self, batch_tokens: int) -> Any:
        llama, shape = self._llama, self._shape
        params = llama.llama_context_default_params()
        params.embeddings = True
        params.pooling_type = int(self.pooling)
        params.n_ctx = max(shape.text_tokens, batch_tokens)
        params.n_batch = params.n_ubatch = batch_tokens
        params.n_seq_max = self.sequences
        params.n_threads = params.n_threads_batch = shape.threads
        params.kv_unified = True
        params.swa_full = False
        params.no_perf = True
        params.abort_callback = self._abort
        set_kv_type(params, shape.kv_type)
        may_be_plain = shape.plain and not is_quantized(shape.kv_type)
        if may_be_plain and self._scores_bytes(batch_tokens, params.n_ctx) <= _PLAIN_SCORES_BYTES:
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama.llama_init_from_model(self._native, params)
        if not context:
            raise ContextError(f"the engine makes no context for texts of {shape.text_tokens} tokens")
        return context

    def _scores_bytes(self, batch_tokens: int, cells: int) -> int:
        return int(self._llama.llama_model_n_head(self._native)) * batch_tokens * cells * 4
