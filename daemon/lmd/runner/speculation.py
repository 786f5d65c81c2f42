"""Speculative decoding: guess the next tokens cheaply, check all of them in one step of the model.

The engine decodes a guess behind the last token and samples at each of its places as it would without one. A guessed
token stays if it is the one that was sampled; the first one that differs is replaced by the sampled one, and the rest
is dropped. So every token is sampled by the model, from the same scores, by a sampler in the same state as in plain
decoding: guesses change how many tokens a step yields, and never which. See docs/concepts/speculation.md.

Nothing here reads the clock or draws random numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

#: The most tokens that are ever drafted at once. A step of sixteen is the last that gains on the CPU: seventeen
#: cost a fifth more than sixteen (see `STEP_COSTS`).
MAX_DRAFT = 15


class Drafter(Protocol):
    """Guesses how one sequence goes on."""

    def draft(self, tokens: array[int], limit: int) -> list[int]:
        """Guess what follows *tokens*, the whole sequence so far; at most *limit* tokens, and none without an idea."""

    def forget(self) -> None:
        """Take note that the sequence ends."""


def accepted(drafted: Sequence[int], sampled: Sequence[int]) -> int:
    """Return how many drafted tokens stay: those before the first that is not the one sampled at its place.

    *sampled* may be shorter, when sampling stopped at the first difference, and one longer, for the place behind the
    last drafted token.
    """
    count = 0
    for guess, token in zip(drafted, sampled, strict=False):
        if guess != token:
            break
        count += 1
    return count


# Prompt lookup

_MIN_MATCH = 2
_MAX_MATCH = 8
# Earlier places with the same last two tokens that are compared, latest first.
_CANDIDATES = 16
_MAX_INDEXED = 1 << 16
_TAIL = 8


class PromptLookup:
    """Guesses that what followed the last tokens earlier in the sequence follows them again.

    Summaries, edits and extractions repeat long parts of their prompt. The longest match wins, the latest of equal
    ones; a short match is good for a short guess only (*trust*).

    An index leads from each pair of tokens to the latest place behind it, and from each place to the one before with
    the same pair, as in LZ77; it grows by what is new since the last call. It covers the last 32 to 64 thousand tokens,
    about 150 bytes each. Guesses are read from the tokens that are given, so an index that is out of date can only make
    them worse.
    """

    def __init__(self) -> None:
        self.forget()

    def draft(self, tokens: array[int], limit: int) -> list[int]:
        """Guess; see `Drafter`."""
        self._follow(tokens)
        place, length = self._best_match(tokens)
        if length < _MIN_MATCH:
            return []
        guess: list[int] = []
        size = len(tokens)
        for position in range(place, place + min(limit, _trust(length))):
            # A place less than the limit before the end repeats itself: the guess goes on from its own beginning.
            guess.append(tokens[position] if position < size else guess[position - size])
        return guess

    def forget(self) -> None:
        """Drop the index."""
        self._restart(0)

    def _restart(self, start: int) -> None:
        self._start = self._size = start
        self._latest: dict[int, int] = {}
        # By place, counted from the start.
        self._previous = array("i", [-1])
        self._tail = array("i")

    def _follow(self, tokens: array[int]) -> None:
        """Bring the index up to *tokens*; begin anew when they are not a continuation (the context was shifted)."""
        size = len(tokens)
        if size < self._size or tokens[max(0, self._size - _TAIL) : self._size] != self._tail:
            self._restart(0)
        if size - self._start > _MAX_INDEXED:
            self._restart(size - _MAX_INDEXED // 2)
        latest, previous = self._latest, self._previous
        for place in range(self._size + 1, size + 1):
            if place - self._start < _MIN_MATCH:
                previous.append(-1)
                continue
            pair = tokens[place - 2] << 32 | tokens[place - 1]
            previous.append(latest.get(pair, -1))
            latest[pair] = place
        self._size = size
        self._tail = tokens[max(0, size - _TAIL) :]

    def _best_match(self, tokens: array[int]) -> tuple[int, int]:
        """Return the place behind the best earlier match of the end, and the length of the match (0: there is none)."""
        size = len(tokens)
        best, longest = -1, 0
        place = self._previous[size - self._start]
        for _ in range(_CANDIDATES):
            if place < 0:
                break
            # The pair is compared too: after a cut that went unseen, another one may stand there.
            length, most = 0, min(_MAX_MATCH, place)
            while length < most and tokens[place - 1 - length] == tokens[size - 1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
                if length == _MAX_MATCH:
                    break
            place = self._previous[place - self._start]
        return best, longest


def _trust(length: int) -> int:
    """Return how many tokens to guess after a match of so many.

    In texts and code of this project, 47 to 51 % of the guessed tokens were right after a match of 2, 56 to 60 % after
    3, 65 % after 4, 71 % and more after 5 (tokenizer of Llama 3). With half of them right only the first one pays.
    """
    return MAX_DRAFT if length >= 5 else (0, 0, 1, 2, 3)[length]


# How much to guess

#: What a step of 1, 2, 3 … tokens of one sequence costs, as a multiple of a step of one token.
#:
#: Measured with ``python -m bench.step_cost`` (0.4 B parameters, Q4_K_M, vocabulary of 128,256, 256 tokens of context,
#: two threads of an AMD EPYC with AVX-512; the least of six rounds, each checked to have had both cores for itself;
#: places 10, 11 and 13 to 15 lie on lines between their neighbours). One token takes 12.3 ms. Two cost half as much
#: again: on the CPU the arithmetic counts as much as reading the weights. Models of 0.1 and 0.3 B parameters, one of
#: them with a vocabulary of a thousand, are within a quarter of this. Where reading the weights dominates, on
#: accelerators and with many cores, the steps of a few tokens are cheaper than this says; drafting is then more careful
#: than it had to be.
#:
#: A table, and not a measurement at load: what a request does must not depend on what else the machine did then.
STEP_COSTS = (1.0, 1.49, 1.79, 2.27, 2.65, 2.95, 3.36, 3.39, 3.67, 3.79, 3.92, 4.04, 4.09, 4.14, 4.19, 4.24)

# The estimate begins as if three of four guesses had been right, and forgets half of what it saw in 24 guesses.
_PRIOR_RIGHT, _PRIOR_TRIED = 3.0, 4.0
_FORGET = 0.5 ** (1 / 24)
# Guesses must promise this much, since the estimate is one.
_WORTH = 1.05
# After drafting was found to lose: plain steps until it is tried again, twice as many each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 512
_PROBE = 2


class Pace:
    """Decides how many tokens to guess in the next step of one request, from how the guesses so far fared.

    If each guess is right with the chance *a*, a step with *d* guesses yields ``1 + a + a² + … + a^d`` tokens and costs
    ``STEP_COSTS`` of d + 1 tokens, plus *draft_cost* for each guess; the *d* with the most tokens for the cost is
    taken. When none beats plain decoding, none is made for a while; then two are, to see whether that has changed.

    *draft_cost* is what one guess costs, as a multiple of a step of one token: the relative size of a draft model, 0
    for prompt lookup. Only counts enter, never times: the same guesses with the same fate lead to the same steps.
    """

    def __init__(self, draft_cost: float = 0.0, step_costs: Sequence[float] = STEP_COSTS) -> None:
        self._draft_cost = draft_cost
        self._step_costs = step_costs
        self._right = _PRIOR_RIGHT
        self._tried = _PRIOR_TRIED
        self._pause = 0
        self._rest = 0
        # A draft model that is hardly smaller than the model loses even when it is always right.
        self._hopeless = self._best(MAX_DRAFT, 1.0) == 0

    def limit(self, *, active: int, wanted: int) -> int:
        """Return how many tokens to guess at most in the next step; 0 is plain decoding.

        *wanted* is the most that the caller wants, negative when that is left to this. With other sequences *active*
        in the step there is no spare capacity that a guess could use: the answer is 0.
        """
        most = min(len(self._step_costs) - 1, MAX_DRAFT)
        most = most if wanted < 0 else min(most, wanted)
        if active > 1 or self._rest > 0 or self._hopeless:
            return 0
        best = self._best(most, self._right / self._tried)
        return best if best or not most else min(_PROBE, most)

    def note(self, drafted: int, accepted: int) -> None:
        """Take note of a step; call it after every one of the request, with 0 and 0 for a plain one."""
        if not drafted:
            self._rest = max(0, self._rest - 1)
            return
        # What comes after the first wrong guess was never tried.
        tried = accepted if accepted == drafted else accepted + 1
        kept = _FORGET**tried
        self._right = self._right * kept + accepted
        self._tried = self._tried * kept + tried
        if self._best(MAX_DRAFT, self._right / self._tried):
            self._pause = 0
        elif accepted < drafted:
            # A probe that was right is followed by another one: what lost before need not lose now.
            self._pause = min(self._pause * 2, _LONGEST_PAUSE) if self._pause else _FIRST_PAUSE
            self._rest = self._pause

    def _best(self, most: int, chance: float) -> int:
        """Return the number of guesses, at most *most*, that promises most; 0 when plain decoding does."""
        best, best_gain = 0, _WORTH
        tokens, power = 1.0, 1.0
        for count in range(1, min(most, len(self._step_costs) - 1) + 1):
            power *= chance
            tokens += power
            gain = tokens / (self._step_costs[count] + count * self._draft_cost)
            if gain > best_gain:
                best, best_gain = count, gain
        return best


# A request's drafters


class DraftSource(Protocol):
    """A draft model, as far as requests are concerned.

    Attributes:
        relative_cost: what it takes to draft a token, as a multiple of a step of one token of the model.
    """

    relative_cost: float

    def drafter(self, scope: str) -> Drafter:
        """Return a drafter for one sequence of the caller *scope*."""


@dataclass(slots=True)
class _Paced:
    drafter: Drafter
    pace: Pace


class Speculation:
    """The drafters of one request: the first one with an idea drafts, each at a pace of its own.

    Attributes:
        drafted_tokens: tokens drafted so far.
        accepted_tokens: of those, accepted.
    """

    def __init__(self, drafters: Sequence[tuple[Drafter, Pace]], *, wanted: int, vocab_size: int) -> None:
        self._drafters = [_Paced(drafter, pace) for drafter, pace in drafters]
        self._wanted = wanted
        self._vocab_size = vocab_size
        self._used: _Paced | None = None
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    def draft(self, tokens: array[int], *, active: int, room: int) -> list[int]:
        """Guess what follows *tokens*: prompt, answer, and the sampled token that is not decoded yet.

        At most *room* tokens, all of them of the model's vocabulary; *active* counts the sequences of the step.
        """
        self._used = None
        wanted = room if self._wanted < 0 else min(self._wanted, room)
        for each in self._drafters:
            limit = each.pace.limit(active=active, wanted=max(0, wanted))
            guess = each.drafter.draft(tokens, limit) if limit else []
            # The vocabulary of a draft model may be padded to another size.
            end = next((at for at, token in enumerate(guess) if not 0 <= token < self._vocab_size), len(guess))
            if end:
                self._used = each
                return guess[:end]
        return []

    def note(self, drafted: int, accepted: int) -> None:
        """Take note of a step; call it after every one of the request, with 0 and 0 when nothing was drafted."""
        for each in self._drafters:
            each.pace.note(*((drafted, accepted) if each is self._used else (0, 0)))
        self._used = None
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted

    def forget(self) -> None:
        """Take note that the sequence ends."""
        for each in self._drafters:
            each.drafter.forget()


def make_speculation(
    *, draft_num_predict: int, prompt_lookup: bool, model: DraftSource | None, scope: str, vocab_size: int
) -> Speculation | None:
    """Return what drafts for a request, None when nothing does; the arguments are those of `Sampling`.

    Looking up costs nothing, so it comes first, and the draft model has its turn where the prompt has no answer.
    """
    if draft_num_predict == 0:
        return None
    drafters: list[tuple[Drafter, Pace]] = []
    if prompt_lookup:
        drafters.append((PromptLookup(), Pace()))
    if model is not None:
        drafters.append((model.drafter(scope), Pace(model.relative_cost)))
    return Speculation(drafters, wanted=draft_num_predict, vocab_size=vocab_size) if drafters else None
