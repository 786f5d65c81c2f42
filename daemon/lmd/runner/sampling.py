"""Chooses the next token.

Order: token biases, penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature, choice; that of llama.cpp's own
tools (source: `common_params_sampling::samplers` and `common_sampler_init` in llama.cpp's common/, as in
llama-cpp-python 0.3.36). Mirostat replaces what comes after DRY but temperature; temperature 0 replaces it with the
best token. What comes before top-k is ours (`adjust.py`, `dry.py`), the rest is the engine's.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from lmd.runner.adjust import Adjustment, Biases, Penalties
from lmd.runner.dry import Breakers, Dry
from lmd.runner.rows import best_of, logits_address, numpy_is_here, row_at
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import Vocab

if TYPE_CHECKING:
    from lmd.runner.rows import Ids, Row

#: Seeds are below this, which is the engine's "pick one".
SEEDS = 2**32 - 1

# The number of most likely tokens mirostat 1 estimates from: the paper's m.
_MIROSTAT_M = 100

# Tokens that many times less likely than the best are as good as forbidden. Samplers that compute with logarithms of
# probabilities get NaN from those that are 0, so they get none.
_POSSIBLE = 1e-37


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a field of a request."""

    field: str
    message: str


_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "mirostat_tau",
    "mirostat_eta",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "dry_base",
)


def find_problem(sampling: frames_pb2.Sampling, vocab_size: int) -> Problem | None:
    """Return the first thing that is wrong with the values, None when nothing is.

    The daemon has checked the ranges; this catches what would make the engine compute nonsense or stop, and tokens
    that the model does not have, which only the runner can tell.
    """
    for name in _NUMBERS:
        if not math.isfinite(getattr(sampling, name)):
            return Problem(name, f"{name} is not a finite number")
    if sampling.repeat_penalty <= 0:
        return Problem("repeat_penalty", "repeat_penalty must be above 0")
    if sampling.mirostat not in (0, 1, 2):
        return Problem("mirostat", "mirostat must be 0, 1 or 2")
    if sampling.dry_multiplier != 0:
        if sampling.dry_base < 1:
            return Problem("dry_base", "dry_base must be at least 1")
        if sampling.dry_allowed_length < 1:
            return Problem("dry_allowed_length", "dry_allowed_length must be at least 1")
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocab_size:
            return _no_such_token("logit_bias", token, vocab_size)
        if math.isnan(bias) or bias == math.inf:
            return Problem("logit_bias", f"logit_bias of token {token} is neither finite nor -infinity")
    for token in sampling.stop_tokens:
        if not 0 <= token < vocab_size:
            return _no_such_token("stop_tokens", token, vocab_size)
    return None


def _no_such_token(field: str, token: int, vocab_size: int) -> Problem:
    return Problem(field, f"{field} names token {token}, but the model has the tokens 0 to {vocab_size - 1}")


class Sampler:
    """Chooses the tokens of one answer. Its native part must be freed; not thread-safe.

    The same seed, settings and logits give the same tokens.
    """

    def __init__(
        self,
        llama: Any,
        vocab: Vocab,
        sampling: frames_pb2.Sampling,
        *,
        num_ctx: int,
        prompt: array[int],
        seed: int,
    ) -> None:
        """Make one that has seen *prompt*. *sampling* must have passed `find_problem`."""
        self._llama = llama
        self._vocab_size = vocab.size
        self._adjustments = _adjustments(vocab, sampling, num_ctx=num_ctx, prompt=prompt)
        self._greedy = sampling.temperature <= 0
        self._chain: Any = _make_chain(llama, sampling, vocab_size=vocab.size, seed=seed % SEEDS)

    def sample(self, context: Any, index: int) -> int:
        """Choose the token after the batch's token *index*, and take it as said.

        The logits of that token are the same afterwards as before.

        Raises:
            IndexError: it was decoded without asking for logits.
        """
        token = self.draw(context, index)
        self.accept(token)
        return token

    def draw(self, context: Any, index: int) -> int:
        """Choose as `sample` does but take nothing as said; unless greedy, drawing again draws anew."""
        address = logits_address(self._llama, context, index)
        # The best of 128,256 logits takes numpy 6 µs and the engine, which copies them all, 88 µs (measured). For that
        # alone numpy is not imported.
        if not self._adjustments and not (self._greedy and numpy_is_here()):
            return self._draw_native(context, index)
        row = row_at(address, self._vocab_size)
        undo: list[tuple[Ids, Row]] = []
        try:
            for adjustment in self._adjustments:
                changed = adjustment.changes(row)
                if changed is not None:
                    ids, scores = changed
                    undo.append((ids, row[ids]))
                    row[ids] = scores
            return best_of(row) if self._greedy else self._draw_native(context, index)
        finally:
            for ids, scores in reversed(undo):
                row[ids] = scores

    def _draw_native(self, context: Any, index: int) -> int:
        assert self._chain is not None, "the sampler was freed"
        # It accepts the token, too, which is nothing to any sampler of the chain.
        token: int = self._llama.llama_sampler_sample(self._chain, context, index)
        return token

    def accept(self, token: int) -> None:
        """Take a token as said: penalties look at it from now on."""
        for adjustment in self._adjustments:
            adjustment.accept(token)

    def clone(self) -> Self:
        """Return one that goes on from here by itself: it draws what this one would draw. Free it, too."""
        other = type(self).__new__(type(self))
        other._llama, other._vocab_size, other._greedy = self._llama, self._vocab_size, self._greedy
        other._adjustments = [adjustment.clone() for adjustment in self._adjustments]
        other._chain = self._llama.llama_sampler_clone(self._chain)
        return other

    def free(self) -> None:
        """Free the native part; a second time does nothing."""
        chain, self._chain = self._chain, None
        if chain is not None:
            self._llama.llama_sampler_free(chain)


def _adjustments(vocab: Vocab, sampling: frames_pb2.Sampling, *, num_ctx: int, prompt: array[int]) -> list[Adjustment]:
    """Return what the values do not switch off, in order."""
    found: list[Adjustment] = []
    biases = dict(sampling.logit_bias)
    # Some models name tokens in their metadata that must never be said.
    for token in (*vocab.suppressed, *(vocab.ends if sampling.ignore_eos else ())):
        biases[token] = -math.inf
    if biases:
        found.append(Biases(biases))
    last_n = _window(sampling.repeat_last_n, num_ctx)
    repeat, frequency, presence = sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
    if last_n and (repeat, frequency, presence) != (1, 0, 0):
        found.append(Penalties(last_n=last_n, repeat=repeat, frequency=frequency, presence=presence, prompt=prompt))
    last_n = _window(sampling.dry_penalty_last_n, num_ctx)
    if last_n and sampling.dry_multiplier != 0:
        found.append(
            Dry(
                Breakers(vocab, sampling.dry_sequence_breakers),
                multiplier=sampling.dry_multiplier,
                base=sampling.dry_base,
                allowed=sampling.dry_allowed_length,
                last_n=last_n,
                prompt=prompt,
            )
        )
    return found


def _window(last_n: int, num_ctx: int) -> int:
    return num_ctx if last_n < 0 else min(last_n, num_ctx)


def _make_chain(llama: Any, sampling: frames_pb2.Sampling, *, vocab_size: int, seed: int) -> Any:
    """Return the engine's chain: what comes after DRY."""
    parameters = llama.llama_sampler_chain_default_params()
    parameters.no_perf = True
    chain = llama.llama_sampler_chain_init(parameters)

    def add(sampler: Any) -> None:
        llama.llama_sampler_chain_add(chain, sampler)

    if sampling.temperature <= 0:
        add(llama.llama_sampler_init_greedy())
        return chain
    if sampling.mirostat:
        add(llama.llama_sampler_init_temp(sampling.temperature))
        add(llama.llama_sampler_init_min_p(_POSSIBLE, 1))
        tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
        if sampling.mirostat == 1:
            add(llama.llama_sampler_init_mirostat(vocab_size, seed, tau, eta, _MIROSTAT_M))
        else:
            add(llama.llama_sampler_init_mirostat_v2(seed, tau, eta))
        return chain
    if sampling.top_k > 0:
        add(llama.llama_sampler_init_top_k(sampling.top_k))
    if sampling.typical_p < 1:
        add(llama.llama_sampler_init_min_p(_POSSIBLE, 1))
        add(llama.llama_sampler_init_typical(sampling.typical_p, 1))
    if sampling.top_p < 1:
        add(llama.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        add(llama.llama_sampler_init_min_p(sampling.min_p, 1))
    if sampling.xtc_probability > 0:
        add(llama.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, seed))
    add(llama.llama_sampler_init_temp(sampling.temperature))
    add(llama.llama_sampler_init_dist(seed))
    return chain
