"""What changes the scores of a few tokens before one is chosen: biases, and penalties for what was said before.

The engine has samplers for this. They look every token of the vocabulary up in a hash table, 300 µs for a vocabulary of
128,256, and are told of a prompt token by token, 0.9 µs each (measured). Here it is a handful of array elements.
The results are the same, which tests hold against the engine's.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from lmd.runner.rows import Ids, Row


class Adjustment(Protocol):
    """Changes scores, depending on the tokens so far."""

    def accept(self, token: int) -> None:
        """Take a token as said."""

    def changes(self, row: Row) -> tuple[Ids, Row] | None:
        """Return tokens, each once, and their new scores; None when all stay as they are."""

    def clone(self) -> Self:
        """Return one that goes on from here by itself."""


class Biases:
    """Adds to the scores of tokens; minus infinity forbids one."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        import numpy as np

        self._ids: Ids = np.fromiter(biases.keys(), np.int32, len(biases))
        self._biases: Row = np.fromiter(biases.values(), np.float32, len(biases))

    def accept(self, token: int) -> None:
        """Do nothing: biases do not depend on what was said."""

    def changes(self, row: Row) -> tuple[Ids, Row] | None:
        """Return the tokens and their new scores."""
        return self._ids, row[self._ids] + self._biases

    def clone(self) -> Self:
        """Return itself: it never changes."""
        return self


class Penalties:
    """Lowers the scores of tokens that are among the last *last_n*.

    A positive score is divided by *repeat*, a negative one multiplied; then *presence* is subtracted once and
    *frequency* for each occurrence. Source: llama.cpp, `llama_sampler_penalties_apply`.
    """

    def __init__(
        self, *, last_n: int, repeat: float, frequency: float, presence: float, prompt: array[int] | None = None
    ) -> None:
        self._last_n = last_n
        self._repeat, self._frequency, self._presence = repeat, frequency, presence
        self._window: deque[int] = deque(prompt[-last_n:] if prompt is not None else ())
        self._counts = Counter(self._window)

    def accept(self, token: int) -> None:
        """Take a token as said; the oldest one falls out of the window."""
        self._window.append(token)
        self._counts[token] += 1
        if len(self._window) > self._last_n:
            oldest = self._window.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def changes(self, row: Row) -> tuple[Ids, Row] | None:
        """Return the tokens of the window and their new scores."""
        import numpy as np

        if not self._counts:
            return None
        ids: Ids = np.fromiter(self._counts.keys(), np.int32, len(self._counts))
        counts: Row = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        scores = row[ids]
        repeat = np.float32(self._repeat)
        scores = np.where(scores <= 0, scores * repeat, scores / repeat)
        scores -= counts * np.float32(self._frequency) + np.float32(self._presence)
        return ids, scores

    def clone(self) -> Self:
        """Return one that goes on from here by itself."""
        other = copy(self)
        other._window = self._window.copy()
        other._counts = self._counts.copy()
        return other
