"""The engine in the test's own process, with logits that the test writes: what a model would say is then known."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd.runner.log import install_log
from lmd.runner.native import ENVIRONMENT
from lmd.runner.rows import logits_address, row_at
from lmd.runner.sampling import Sampler
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import Vocab

if TYPE_CHECKING:
    from lmd.runner.rows import Row

#: What a request has that asks for nothing: the engine's plain distribution.
PLAIN: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "xtc_threshold": 0.1,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
}


def plain_sampling(**values: Any) -> frames_pb2.Sampling:
    """Settings that change nothing but what *values* say."""
    return frames_pb2.Sampling(**{**PLAIN, **values})


class NativeEngine:
    """A model and a context. Everything native lives until the process ends.

    Attributes:
        rows: the logits of the tokens of one batch; tests write to them.
    """

    def __init__(self, path: Path, *, rows: int = 2, num_ctx: int = 256) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # The package as a whole: other tests of this process may use the rest of it.
        import llama_cpp.llama_cpp as llama

        self.llama: Any = llama
        install_log(llama, lambda _level, _text, _data: None)
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = self.num_ctx = num_ctx
        parameters.n_threads = parameters.n_threads_batch = 1
        self.context = llama.llama_init_from_model(self._model, parameters)
        self.vocab = Vocab(llama, self._model)
        batch = llama.llama_batch_init(rows, 0, 1)
        batch.n_tokens = rows
        for index in range(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = 1, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        assert llama.llama_decode(self.context, batch) == 0
        llama.llama_batch_free(batch)
        self.rows: list[Row] = [
            row_at(logits_address(llama, self.context, index), self.vocab.size) for index in range(rows)
        ]

    def set(self, logits: Mapping[int, float], *, rest: float = float("-inf"), row: int = 0) -> None:
        """Give tokens their logits, and all others *rest*."""
        self.rows[row][:] = rest
        for token, logit in logits.items():
            self.rows[row][token] = logit

    def sampler(self, prompt: Sequence[int] = (), *, seed: int = 1, **values: Any) -> Sampler:
        """Make a sampler of `plain_sampling(**values)`; free it."""
        return Sampler(
            self.llama,
            self.vocab,
            plain_sampling(**values),
            num_ctx=self.num_ctx,
            prompt=array("i", prompt),
            seed=seed,
        )

    def draws(self, count: int, prompt: Sequence[int] = (), *, seed: int = 1, **values: Any) -> list[int]:
        """Return what a sampler chooses *count* times in a row at the first row of logits."""
        sampler = self.sampler(prompt, seed=seed, **values)
        try:
            return [sampler.sample(self.context, 0) for _ in range(count)]
        finally:
            sampler.free()

    def adjusted(self, sampler: Any, row: Row) -> Row:
        """Return what a native sampler makes of a row, and free it."""
        import numpy as np

        data = (self.llama.llama_token_data * len(row))()
        for token, logit in enumerate(row.tolist()):
            data[token].id, data[token].logit = token, logit
        candidates = self.llama.llama_token_data_array(
            data=ctypes.cast(data, self.llama.llama_token_data_p), size=len(row), selected=-1, sorted=False
        )
        self.llama.llama_sampler_apply(sampler, ctypes.byref(candidates))
        self.llama.llama_sampler_free(sampler)
        return np.array([entry.logit for entry in data], np.float32)
