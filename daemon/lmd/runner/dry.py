"""DRY: the longer what was just said repeats something earlier, the less likely its continuation gets.

When the last k tokens have been said before and were followed by t then, t loses `multiplier * base ** (k - allowed)`.
A breaker, such as a newline, ends what counts as "just said". Sources: its author's description,
https://github.com/oobabooga/text-generation-webui/pull/5677, and llama.cpp's `llama_sampler_dry_apply`, which a test
holds this against. Breakers are found in the text that tokens make, where llama.cpp searches the whole vocabulary for
each: 10 ms for every breaker of every request (128,256 tokens, measured), which anybody could send a thousand of.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Protocol, Self

from lmd.runner.patterns import Patterns, Scan

if TYPE_CHECKING:
    from lmd.runner.rows import Ids, Row

# exp(88.7) is about the largest float of 32 bits.
_LOG_FLOAT_MAX = 88.7228391

# Tokens at the end of a prompt that are searched for a breaker first; then four times as many, and so on.
_FIRST_LOOK_BACK = 64


class Pieces(Protocol):
    """What is needed of a vocabulary."""

    def piece(self, token: int) -> bytes | None:
        """Return the bytes of a token."""


class Breakers:
    """Tells when a breaker ends, from the bytes of tokens."""

    def __init__(self, pieces: Pieces, texts: Iterable[str]) -> None:
        self._pieces = pieces
        # Bytes as characters of the same number: a token may end within a character.
        self._patterns = Patterns(text.encode().decode("latin-1") for text in texts)
        self._scan = Scan(self._patterns)
        self._whole: dict[int, bool] = {}

    def _text(self, token: int) -> str:
        return (self._pieces.piece(token) or b"").decode("latin-1")

    def holds_one(self, token: int) -> bool:
        """Tell whether a token by itself has a breaker in it."""
        if token not in self._whole:
            self._whole[token] = Scan(self._patterns).feed(self._text(token)) is not None
        return self._whole[token]

    def accept(self, token: int) -> bool:
        """Read the next token; tell whether a breaker ended in it."""
        text, ended = self._text(token), False
        begin = self._scan.position
        while (found := self._scan.feed(text)) is not None:
            ended = True
            text = text[found[1] - begin :]
            begin = found[1]
        return ended

    def read(self, prompt: array[int]) -> int:
        """Read a prompt; return how many tokens follow the last breaker, all when there is none."""
        look_back = _FIRST_LOOK_BACK
        while True:
            self._scan = Scan(self._patterns)
            since, found = 0, False
            for token in prompt[-look_back:]:
                ended = self.accept(token)
                found = found or ended
                since = 0 if ended else since + 1
            if found or look_back >= len(prompt):
                return since
            look_back *= 4

    def clone(self) -> Breakers:
        """Return one that goes on from here by itself."""
        other = copy(self)
        other._scan = copy(self._scan)
        return other


class Dry:
    """The adjustment. It sees the last *last_n* tokens.

    For every earlier place it keeps how many tokens that end there equal those that end here, so that a new token
    costs two operations on an array. Invariant: ``lengths[i]`` is the length of the longest common suffix, not
    reaching back beyond the window of its time, of the tokens up to ``start + i`` and of all. The array of lengths is
    replaced and never written to, so that clones can share it.
    """

    def __init__(
        self,
        breakers: Breakers,
        *,
        multiplier: float,
        base: float,
        allowed: int,
        last_n: int,
        prompt: array[int] | None = None,
    ) -> None:
        import numpy as np

        window = prompt[-last_n:] if prompt is not None else array("i")
        self._breakers = breakers
        self._multiplier, self._base, self._allowed, self._last_n = multiplier, base, allowed, last_n
        self._tokens: Ids = np.empty(max(2 * len(window), 256), np.int32)
        self._tokens[: len(window)] = window
        self._start, self._end = 0, len(window)
        self._lengths: Ids = np.array(suffix_lengths(window), np.int32)
        self._since_breaker = breakers.read(window)

    def accept(self, token: int) -> None:
        """Take a token as said."""
        import numpy as np

        if self._end == len(self._tokens):
            self._make_room()
        start, end = self._start, self._end
        lengths: Ids = np.empty(end - start, np.int32)
        if end > start:
            lengths[0] = 1
            np.add(self._lengths, 1, out=lengths[1:])
            lengths *= self._tokens[start:end] == token
        self._tokens[end] = token
        self._end = end + 1
        if self._end - start > self._last_n:
            self._start += 1
            lengths = lengths[1:]
        self._lengths = lengths
        self._since_breaker = 0 if self._breakers.accept(token) else self._since_breaker + 1

    def _make_room(self) -> None:
        import numpy as np

        kept = self._tokens[self._start : self._end]
        tokens: Ids = np.empty(max(2 * len(kept), 256), np.int32)
        tokens[: len(kept)] = kept
        self._tokens, self._start, self._end = tokens, 0, len(kept)

    def changes(self, row: Row) -> tuple[Ids, Row] | None:
        """Return the tokens that would go on with a repetition and their new scores."""
        import numpy as np

        count = self._end - self._start
        limit = min(self._since_breaker, count)
        if count <= self._allowed or limit < self._allowed:
            return None
        # No match reaches back beyond the window, which has moved on since it was counted.
        lengths = np.minimum(np.minimum(self._lengths, np.arange(1, count, dtype=np.int32)), np.int32(limit))
        places = np.flatnonzero(lengths >= self._allowed)
        if not len(places):
            return None
        found = lengths[places]
        order = np.argsort(-found, kind="stable")
        # The first of each token is then the longest of its repetitions.
        tokens, first = np.unique(self._tokens[self._start + places + 1][order], return_index=True)
        longest = found[order][first]
        free = np.fromiter((not self._breakers.holds_one(int(token)) for token in tokens), np.bool_, len(tokens))
        tokens, longest = tokens[free], longest[free]
        exponents = longest - self._allowed
        if self._base > 1.000001:
            exponents = np.minimum(exponents, int(_LOG_FLOAT_MAX / math.log(self._base)))
        with np.errstate(over="ignore"):
            losses = (self._multiplier * np.power(self._base, exponents.astype(np.float64))).astype(np.float32)
        ids = tokens.astype(np.int32)
        return ids, row[ids] - losses

    def clone(self) -> Self:
        """Return one that goes on from here by itself."""
        other = copy(self)
        other._breakers = self._breakers.clone()
        other._tokens = self._tokens.copy()
        return other


def suffix_lengths(tokens: Sequence[int]) -> list[int]:
    """Return for each place but the last how many tokens that end there equal those that end at the last.

    Linear: it is the Z function of the reversed sequence. Source: D. Gusfield, Algorithms on Strings, Trees and
    Sequences, 1.4.
    """
    text = list(reversed(tokens))
    size = len(text)
    found = [0] * size
    left = right = 0
    for place in range(1, size):
        length = min(right - place, found[place - left]) if place < right else 0
        while place + length < size and text[length] == text[place + length]:
            length += 1
        found[place] = length
        if place + length > right:
            left, right = place, place + length
    return found[:0:-1]
