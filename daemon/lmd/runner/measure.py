"""How well a model reads a text, and how fast: what a comparison of quantizations shows.

Perplexity as llama.cpp's `llama-perplexity` has it: the text is cut into windows; in each, the tokens of the second
half are scored with all those before them, so that every scored token has at least half a window of context.
"""

from __future__ import annotations

import ctypes
import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmd.runner.batch import Batch
from lmd.runner.weights import load_weights

_WINDOW_TOKENS = 512
_SHORTEST_WINDOW = 16
_STEP_TOKENS = 128
_ANSWER_TOKENS = 32


class MeasureFailed(Exception):
    """Raised when a model cannot be measured on a text; says why."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was found; *tokens* is how many of the text's tokens were scored."""

    perplexity: float
    tokens: int
    prompt_tokens_per_s: float
    answer_tokens_per_s: float


def measure(
    llama: Any, paths: Sequence[str], text: str, threads: int, on_progress: Callable[[int, int], None]
) -> Measurement:
    """Measure the model of the files at *paths*, all shards in order, on the processor.

    Raises:
        MeasureFailed: it does not load, does not generate, or the text is too short.
    """
    native = load_weights(llama, paths, num_gpu=0, use_mmap=True, on_progress=lambda fraction: True)
    if not native:
        raise MeasureFailed("the engine cannot load the model")
    vocab = llama.llama_model_get_vocab(native)
    tokens = _tokenize(llama, vocab, text)
    train_ctx = int(llama.llama_model_n_ctx_train(native)) or _WINDOW_TOKENS
    # A short text or context makes one smaller window.
    window = min(_WINDOW_TOKENS, train_ctx - _ANSWER_TOKENS, len(tokens))
    if window < _SHORTEST_WINDOW:
        raise MeasureFailed(f"the text has {len(tokens)} tokens; at least {_SHORTEST_WINDOW} are needed")
    params = llama.llama_context_default_params()
    params.n_ctx = window + _ANSWER_TOKENS
    params.n_batch = params.n_ubatch = params.n_outputs_max = min(_STEP_TOKENS, window)
    params.n_threads = params.n_threads_batch = threads
    params.no_perf = True
    context = llama.llama_init_from_model(native, params)
    if not context:
        raise MeasureFailed("the engine makes no context")
    if not llama.llama_get_memory(context):
        raise MeasureFailed("the model embeds and does not generate, so it has no perplexity")
    return _Reader(llama, vocab, context, window).read(tokens, on_progress)


class _Reader:
    """Has a model read windows of a text."""

    def __init__(self, llama: Any, vocab: Any, context: Any, window: int) -> None:
        self._llama = llama
        self._context = context
        self._window = window
        self._vocabulary = int(llama.llama_vocab_n_tokens(vocab))
        self._bos = int(llama.llama_vocab_bos(vocab)) if llama.llama_vocab_get_add_bos(vocab) else -1
        self._step = min(_STEP_TOKENS, window)
        self._batch = Batch(llama, self._step, 1)

    def read(self, tokens: array[int], on_progress: Callable[[int, int], None]) -> Measurement:
        """Score the tokens of whole windows, then time a few more as an answer."""
        windows = len(tokens) // self._window
        self._warm_up(tokens)
        surprise, scored, read_s = 0.0, 0, 0.0
        for number in range(windows):
            on_progress(number, windows)
            chunk = tokens[number * self._window : (number + 1) * self._window]
            if self._bos >= 0:
                chunk[0] = self._bos
            began = time.perf_counter()
            more_surprise, more_scored, scoring_s = self._score(chunk)
            read_s += time.perf_counter() - began - scoring_s
            surprise += more_surprise
            scored += more_scored
        answer_s = self._answer()
        perplexity = math.exp(min(surprise / scored, 700.0))
        return Measurement(perplexity, scored, windows * self._window / read_s, _ANSWER_TOKENS / answer_s)

    def _score(self, chunk: array[int]) -> tuple[float, int, float]:
        """Read one window; return the surprise at its second half, of how many tokens, and the time that took."""
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        first = self._window // 2
        surprise, scored, scoring_s = 0.0, 0, 0.0
        for start in range(0, self._window, self._step):
            part = chunk[start : start + self._step]
            rows = [position for position in range(start, start + len(part)) if first <= position < self._window - 1]
            self._batch.clear()
            for offset, token in enumerate(part):
                position = start + offset
                if first <= position < self._window - 1:
                    self._batch.add(token, position, 0)
                else:
                    # The last of a step always has scores, as the engine wants some.
                    self._batch.add_chunk(array("i", [token]), position, 0, sample=offset == len(part) - 1)
            self._decode()
            began = time.perf_counter()
            for position in rows:
                surprise += self._surprise(position - start, chunk[position + 1])
            scoring_s += time.perf_counter() - began
            scored += len(rows)
        return surprise, scored, scoring_s

    def _warm_up(self, tokens: array[int]) -> None:
        """Read the start once: the weights come from the disk with it, and that is not the model's pace."""
        self._batch.clear()
        self._batch.add_chunk(tokens[: self._step], 0, 0, sample=True)
        self._decode()

    def _answer(self) -> float:
        """Generate a few tokens, the likeliest each time; return how long that took, in seconds."""
        import numpy as np

        scores = self._scores(-1)
        began = time.perf_counter()
        for number in range(_ANSWER_TOKENS):
            self._batch.clear()
            self._batch.add(int(np.argmax(scores)), self._window + number, 0)
            self._decode()
            scores = self._scores(-1)
        return time.perf_counter() - began

    def _decode(self) -> None:
        code = self._llama.llama_decode(self._context, self._batch.finish())
        if code != 0:
            raise MeasureFailed(f"the engine fails to read the text (code {code})")

    def _scores(self, row: int) -> Any:
        import numpy as np

        pointer = self._llama.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise MeasureFailed("the engine gives no scores")
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (self._vocabulary,))

    def _surprise(self, row: int, token: int) -> float:
        import numpy as np

        scores = self._scores(row).astype(np.float64)
        top = float(scores.max())
        surprise = top + math.log(float(np.exp(scores - top).sum())) - float(scores[token])
        if not math.isfinite(surprise):
            raise MeasureFailed("the model gives scores that are no numbers")
        return surprise


def _tokenize(llama: Any, vocab: Any, text: str) -> array[int]:
    data = text.encode()
    room = len(data) + 8
    tokens = (ctypes.c_int32 * room)()
    count = int(llama.llama_tokenize(vocab, data, len(data), tokens, room, True, False))
    if count < 0:
        raise MeasureFailed("the engine cannot read the text")
    return array("i", tokens[:count])
