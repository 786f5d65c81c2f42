"""What the engine needs of a decoder: a batch, its memory, samplers.

The engine is written against these protocols, so that a fake which models every KV cell can check it in tests; the real
one is `lmd.runner.backend`.

What decoding promises, and the engine relies on:

- a token may be added for a sequence only at the position after its last one;
- after `decode` returns `DONE`, every added token is in memory, and rows asked for can be sampled until the next call;
- after `NO_ROOM` nothing has changed, and the same batch can be decoded again once cells are free;
- after anything else, what the memory holds of the sequences of this batch is unknown.
"""

from __future__ import annotations

from array import array
from typing import Protocol

from lmd.runner.adapters import Scales
from lmd.runner.v1 import frames_pb2

#: Results of `decode`; anything else is a failure. Source: `llama_decode` in llama.h.
DONE, NO_ROOM = 0, 1


class StepBatch(Protocol):
    """The tokens of one call of `decode`."""

    @property
    def capacity(self) -> int:
        """The most tokens."""

    def clear(self) -> None:
        """Empty it."""

    def add(self, token: int, position: int, sequence: int) -> int:
        """Add one token whose successor is sampled; return its row."""

    def add_chunk(self, tokens: array[int], position: int, sequence: int, *, sample: bool) -> int:
        """Add tokens from *position* on; with *sample* the successor of the last is sampled. Return that one's row."""


class SequenceMemory(Protocol):
    """What is kept of each sequence, by position."""

    @property
    def shares_freely(self) -> bool:
        """Whether any beginning of any sequence can be copied and cut at any time."""

    @property
    def can_shift(self) -> bool:
        """Whether positions can be moved."""

    def reusable(self, sequence: int, length: int, shared: int, *, idle: bool) -> int:
        """Return how many of the *shared* first positions of a sequence of *length* another prompt can start from."""

    def keep(self, sequence: int, length: int) -> bool:
        """Drop all but the first *length* positions; on failure drop all and return false."""

    def copy(self, source: int, target: int, length: int) -> bool:
        """Give *target*, and nothing else to it, the first *length* positions; on failure leave it empty."""

    def extend(self, source: int, target: int, begin: int, end: int) -> bool:
        """Give *target*, which holds at most the positions before *begin*, those of *source* from there to *end*.

        *target* must share its memory freely. On failure it is empty.
        """

    def clear(self, sequence: int) -> None:
        """Drop a sequence."""

    def shift(self, sequence: int, keep: int, discard: int) -> bool:
        """Drop *discard* positions after the first *keep* and move up what follows; its cells must not be shared."""


class SequenceStates(Protocol):
    """Copies of what the memory holds of a sequence."""

    def size(self, sequence: int) -> int:
        """Return the bytes of a sequence's state as it is now; 0 when the engine cannot tell."""

    def save(self, sequence: int, length: int, into: memoryview) -> bool:
        """Write the state of a sequence that ends before position *length*; say whether it is there."""

    def restore(self, sequence: int, state: memoryview, length: int) -> bool:
        """Put a state that ends before position *length* into an empty sequence; leave it empty on failure."""


class TokenSampler(Protocol):
    """Chooses tokens for one answer."""

    def sample(self, row: int) -> int:
        """Choose the successor of a row of the last batch, and remember it."""

    def free(self) -> None:
        """Give back what it holds. Idempotent."""


class Backend(Protocol):
    """A decoder with one memory for all sequences. Not thread-safe.

    Attributes:
        num_ctx: positions that one sequence can have.
        slots: sequences that are decoded at once.
        sequences: sequences that the memory can hold, at least as many as slots.
        cells: positions that the memory can hold, shared ones counted once.
        rows: rows that can be sampled after one call.
        mixes: whether answers and prompts are decoded faster in one batch than one after the other.
        idle_tokens: tokens that nobody decodes and that may stay in memory without slowing others much.
        idle_rows: rows of batches that more of them may see before they are moved: what that costs a copy costs, too.
        states: copies sequences out of memory and in; None where that is not possible, or not wanted.
        parked_bytes: what such copies of idle sequences may take.
    """

    num_ctx: int
    slots: int
    sequences: int
    cells: int
    rows: int
    mixes: bool
    idle_tokens: int
    idle_rows: int
    states: SequenceStates | None
    parked_bytes: int

    @property
    def batch(self) -> StepBatch:
        """The batch of the next call of `decode`."""

    @property
    def memory(self) -> SequenceMemory:
        """The memory."""

    def adapt(self, scales: Scales | None) -> None:
        """Decode with these scales of adapters from now on; None for the model's own."""

    def decode(self) -> int:
        """Decode the batch; return `DONE`, `NO_ROOM` or a failure."""

    def sampler(self, sampling: frames_pb2.Sampling, prompt: array[int], *, seed: int) -> TokenSampler:
        """Return a sampler that has seen *prompt*."""

    def logits(self, row: int) -> int:
        """Return the address of a row's scores: one float32 for each token of the vocabulary, writable."""
