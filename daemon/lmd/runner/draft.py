"""A second, smaller model in the same runner that drafts for the first one."""

from __future__ import annotations

import ctypes
import math
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from lmd.runner.batch import Batch
from lmd.runner.gpus import MAIN_MEMORY, Placement
from lmd.runner.log import EngineLog
from lmd.runner.memory import Memory
from lmd.runner.model import LoadError
from lmd.runner.prefix_cache import common_prefix
from lmd.runner.threads import Threads
from lmd.runner.v1 import frames_pb2
from lmd.runner.weights import load_weights

# Candidates that a draft's probability is computed over, as in llama.cpp's own drafting (which takes 10). All 128,256
# of them cost 1 ms, these 0.04 ms (measured), and a draft's step only a few times as much.
_CANDIDATES = 8
# A second and further guess must be at least this likely to the draft itself. The first is made whatever it is: its
# step is paid for by then.
_LEAST_LIKELY = 0.5
# A token of a prompt costs this much of a step of one token, in chunks of 32 and more (see `speculation.STEP_COSTS`).
_PROMPT_TOKEN_COST = 0.2
# Steps of the model that may be spent on reading a prompt before any token was generated.
_ADVANCE = 4


class _Refused(Exception):
    """Raised when a file cannot draft; the message says why."""


def load_draft(
    llama: Any,
    log: EngineLog,
    load: frames_pb2.Load,
    *,
    num_ctx: int,
    step_tokens: int,
    threads: Threads,
    target_bytes: int,
    on_progress: Callable[[float], bool],
    placement: Placement = MAIN_MEMORY,
) -> DraftModel | None:
    """Load the draft model of *load*, if it has one, beside the model itself, which has been loaded.

    A draft makes answers faster and never different, so one that the engine refuses is reported on stderr and left
    out: None. One for which there is no memory fails the load as the model would: the daemon can make room, and has
    promised to say when it cannot.

    Args:
        num_ctx: tokens of context of one sequence of the model.
        step_tokens: tokens the draft decodes at once.
        threads: those of the model.
        target_bytes: what the model's weights take.
        placement: where the model's layers are; the draft goes to the first of its devices.

    Raises:
        LoadError: there is not enough memory.
        LoadAborted: *on_progress* returned false.
    """
    if not load.draft_paths:
        return None
    # The daemon shows where the model is, not the draft.
    gpu_layers = log.gpu_layers
    log.out_of_memory = False
    try:
        # All of it on the accelerator or nothing: a draft that computes in two places is too slow to be of use.
        native = load_weights(
            llama,
            load.draft_paths,
            num_gpu=-1 if load.num_gpu else 0,
            placement=placement.first,
            use_mmap=load.use_mmap,
            on_progress=on_progress,
        )
        if not native:
            raise _Refused(log.errors() or "the engine gives no reason")
        return DraftModel(
            llama, log, native, num_ctx=num_ctx, step_tokens=step_tokens, threads=threads, target_bytes=target_bytes
        )
    except _Refused as refused:
        if log.out_of_memory:
            message = f"the draft model: {refused}"
            raise LoadError(frames_pb2.LoadFailed.KIND_OUT_OF_MEMORY, message) from refused
        sys.stderr.write(f"lmd-runner: nothing is drafted, for the draft model cannot be used: {refused}\n")
        return None
    finally:
        log.gpu_layers = gpu_layers


class DraftModel:
    """A loaded draft with a context of one sequence. Everything native lives until the process ends.

    Drafting pays only while one sequence is decoded, so there is one memory for all that are drafted for in turn. It
    is kept between them: the next turn of a chat finds what the last one left, if the same caller asks.

    Attributes:
        num_ctx: tokens it can draft after; no more than it was trained for.
        relative_cost: what it costs to draft a token, as a multiple of a step of one token of the model. Such a step
            reads all weights once, so it is taken from their sizes; a time would differ with every load.
    """

    def __init__(
        self,
        llama: Any,
        log: EngineLog,
        native: Any,
        *,
        num_ctx: int,
        step_tokens: int,
        threads: Threads,
        target_bytes: int,
    ) -> None:
        self._llama = llama
        self._native = native
        _check_kind(llama, native)
        train_ctx = int(llama.llama_model_n_ctx_train(native))
        self.num_ctx = min(num_ctx, train_ctx) if train_ctx > 0 else num_ctx
        self.relative_cost = int(llama.llama_model_size(native)) / max(target_bytes, 1)
        self._vocab = llama.llama_model_get_vocab(native)
        self._vocab_size = int(llama.llama_vocab_n_tokens(self._vocab))
        self._context = self._make_context(log, step_tokens)
        llama.llama_set_n_threads(self._context, threads.decode, threads.prefill)
        self._memory = Memory(llama, self._context, native)
        self._batch = Batch(llama, step_tokens, 1)
        self._best = _BestToken(llama, self._context)
        # What the memory holds, and whose it is.
        self._tokens = array("i")
        self._scope = ""
        self._broken = False

    def drafter(self, scope: str) -> ModelDrafter:
        """Return a drafter for one sequence of the caller *scope*."""
        return ModelDrafter(self, scope)

    def draft(self, tokens: array[int], limit: int, *, scope: str, generated: int) -> list[int]:
        """Guess at most *limit* tokens after *tokens*, the last *generated* of which are the answer.

        Decodes one chunk of what it has not read of them at most, and returns nothing before it has read all. A long
        prompt waits until the answer is long enough for that to pay, were it to end now.
        """
        limit = min(limit, self.num_ctx - len(tokens))
        if self._broken or limit <= 0 or not tokens:
            return []
        shared = common_prefix(self._tokens, tokens, len(tokens) - 1) if scope == self._scope else 0
        missing = len(tokens) - shared
        if missing * self.relative_cost * _PROMPT_TOKEN_COST > generated + _ADVANCE:
            return []
        self._scope = scope
        self._cut(shared)
        chunk = tokens[len(self._tokens) : len(self._tokens) + self._batch.capacity]
        if min(chunk) < 0 or max(chunk) >= self._vocab_size:
            return []
        if not self._decode(chunk) or len(self._tokens) < len(tokens):
            return []
        return self._guess(limit)

    def _guess(self, limit: int) -> list[int]:
        """Continue what is in memory, each time with the best token."""
        guess: list[int] = []
        while True:
            token, likelihood = self._best.after_last_token()
            if self._llama.llama_vocab_is_eog(self._vocab, token):
                # The model may well end here; there is nothing to gain from having guessed that.
                return guess
            if guess and likelihood < _LEAST_LIKELY:
                return guess
            guess.append(token)
            if len(guess) >= limit or not self._decode(array("i", [token])):
                return guess

    def _cut(self, length: int) -> None:
        if length < len(self._tokens) and not self._memory.keep(0, length):
            length = 0
        del self._tokens[length:]

    def _decode(self, chunk: array[int]) -> bool:
        """Read *chunk*; on failure, which nothing in the request can cause, stop drafting for good."""
        self._batch.clear()
        self._batch.add_chunk(chunk, len(self._tokens), 0, sample=True)
        code = self._llama.llama_decode(self._context, self._batch.finish())
        if code:
            self._broken = True
            sys.stderr.write(f"lmd-runner: drafting stops, for the draft model failed to decode (code {code})\n")
            return False
        self._tokens.extend(chunk)
        return True

    def _make_context(self, log: EngineLog, step_tokens: int) -> Any:
        llama = self._llama
        params = llama.llama_context_default_params()
        params.n_ctx = self.num_ctx
        params.n_batch = params.n_ubatch = step_tokens
        params.n_seq_max = 1
        params.n_outputs_max = 1
        # Wrong guesses are taken back, which a window that moves on does not allow.
        params.swa_full = True
        params.no_perf = True
        context = llama.llama_init_from_model(self._native, params)
        if not context:
            raise _Refused(log.errors() or "the engine makes no context")
        return context


class ModelDrafter:
    """Drafts for one sequence with a model that others use as well; see `speculation.Drafter`."""

    def __init__(self, model: DraftModel, scope: str) -> None:
        self._model = model
        self._scope = scope
        self._prompt_tokens: int | None = None

    def draft(self, tokens: array[int], limit: int) -> list[int]:
        """Guess; see `Drafter`."""
        if self._prompt_tokens is None or len(tokens) < self._prompt_tokens:
            # The first call comes with the first token of the answer.
            self._prompt_tokens = len(tokens) - 1
        generated = len(tokens) - self._prompt_tokens
        return self._model.draft(tokens, limit, scope=self._scope, generated=generated)

    def forget(self) -> None:
        """Take note that the sequence ends; the model keeps what it has read for the next one."""
        self._prompt_tokens = None


class _BestToken:
    """The best next token of a context and how likely it is, found inside of the engine.

    A chain of samplers sorts the best few out of all candidates; at its end stands a sampler of our own, called with
    those. Copying all of them into Python's memory first would take longer than everything else (0.8 ms).
    """

    def __init__(self, llama: Any, context: Any) -> None:
        self._llama = llama
        self._context = context
        self._token = 0
        self._likelihood = 0.0
        # ctypes frees callbacks with their last reference, so they live in fields.
        self._interface = llama.llama_sampler_i()
        self._interface.name = llama.llama_sampler_i_name(_name)
        self._interface.apply = llama.llama_sampler_i_apply(self._apply)
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(self._chain, llama.llama_sampler_init_top_k(_CANDIDATES))
        llama.llama_sampler_chain_add(self._chain, llama.llama_sampler_init(ctypes.byref(self._interface), None))

    def after_last_token(self) -> tuple[int, float]:
        """Return the best token after the last decoded one, and its probability among the best few."""
        self._llama.llama_sampler_sample(self._chain, self._context, -1)
        return self._token, self._likelihood

    def _apply(self, _sampler: object, candidates: Any) -> None:
        """Read the candidates, sorted by now; called by the engine, which must not see an exception."""
        found = candidates.contents
        found.selected = 0
        self._token, self._likelihood = found.data[0].id, likelihood([found.data[i].logit for i in range(found.size)])


def likelihood(logits: Sequence[float]) -> float:
    """Return the probability of the first of *logits*, which is the highest, among them; 0 when it is not a number."""
    total = sum(math.exp(logit - logits[0]) for logit in logits)
    return 1 / total if total >= 1 else 0.0


def _name(_sampler: object) -> bytes:
    return b"best"


def _check_kind(llama: Any, native: Any) -> None:
    """Refuse what loads but cannot draft."""
    if llama.llama_vocab_type(llama.llama_model_get_vocab(native)) == llama.LLAMA_VOCAB_TYPE_NONE:
        raise _Refused("the file has no tokenizer")
    if llama.llama_model_has_encoder(native) or not llama.llama_model_has_decoder(native):
        raise _Refused("it does not continue text")
    if llama.llama_model_is_diffusion(native):
        raise _Refused("diffusion models do not guess the next token")
    if llama.llama_model_is_recurrent(native) or llama.llama_model_is_hybrid(native):
        raise _Refused("its state cannot take a token back")
