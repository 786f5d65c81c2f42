"""A decoder that models every KV cell, for checking the engine without llama.cpp.

A cell holds a position, a token, and the sequences that use it, as in llama.cpp's unified cache: a copy adds a sequence
to cells, and a cell that several sequences share has one position. What comes after a row is a function of the tokens
its sequence can see, so a wrong cell anywhere gives a wrong answer.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmd.runner.adapters import Scales
from lmd.runner.seams import DONE, NO_ROOM, SequenceStates
from lmd.runner.v1 import frames_pb2

VOCAB = 50
END = 0
FAILED = -3


def successor(seen: Sequence[int], seed: int = 0) -> int:
    """Return what follows *seen*; the end comes by chance, about once in fifty tokens."""
    digest = hashlib.blake2b(repr((list(seen), seed)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % VOCAB


def continuation(prompt: Sequence[int], limit: int, *, num_ctx: int, seed: int = 0) -> list[int]:
    """Return the answer that a decoder alone with *prompt* would give."""
    seen = list(prompt)
    answer: list[int] = []
    while len(answer) < min(limit, num_ctx - len(prompt)):
        token = successor(seen, seed)
        if token == END:
            break
        answer.append(token)
        seen.append(token)
    return answer


@dataclass
class Cell:
    position: int
    token: int
    sequences: set[int]
    #: What it was decoded with.
    adapters: Scales | None = None


@dataclass
class FakeBatch:
    capacity: int
    tokens: list[tuple[int, int, int, bool]] = field(default_factory=list)

    def clear(self) -> None:
        self.tokens.clear()

    def add(self, token: int, position: int, sequence: int) -> int:
        self.tokens.append((token, position, sequence, True))
        assert len(self.tokens) <= self.capacity, "more tokens than a step can decode"
        return len(self.tokens) - 1

    def add_chunk(self, tokens: array[int], position: int, sequence: int, *, sample: bool) -> int:
        assert len(tokens) > 0, "an empty chunk"
        for index, token in enumerate(tokens):
            self.tokens.append((token, position + index, sequence, sample and index == len(tokens) - 1))
        assert len(self.tokens) <= self.capacity, "more tokens than a step can decode"
        return len(self.tokens) - 1


class FakeMemory:
    """Cells. With *plain* false it behaves like recurrent state: a sequence can be continued, never cut or copied."""

    def __init__(self, cells: int, sequences: int, *, plain: bool, can_shift: bool) -> None:
        self.size = cells
        self.sequences = sequences
        self.cells: list[Cell] = []
        self.shares_freely = plain
        self.can_shift = plain and can_shift

    def of(self, sequence: int) -> list[Cell]:
        return sorted((c for c in self.cells if sequence in c.sequences), key=lambda cell: cell.position)

    def length(self, sequence: int) -> int:
        found = self.of(sequence)
        assert [cell.position for cell in found] == list(range(len(found))), "a sequence with holes"
        return len(found)

    def reusable(self, sequence: int, length: int, shared: int, *, idle: bool) -> int:
        assert self.length(sequence) == length, "what is taken to be in memory is not there"
        return shared if self.shares_freely or (idle and shared == length) else 0

    def keep(self, sequence: int, length: int) -> bool:
        if not self.shares_freely and length < self.length(sequence):
            self.clear(sequence)
            return False
        self._leave(sequence, [cell for cell in self.of(sequence) if cell.position >= length])
        return True

    def copy(self, source: int, target: int, length: int) -> bool:
        assert source != target
        self.clear(target)
        if not self.shares_freely:
            return False
        assert self.length(source) >= length
        for cell in self.of(source)[:length]:
            cell.sequences.add(target)
        return True

    def extend(self, source: int, target: int, begin: int, end: int) -> bool:
        assert self.shares_freely
        assert source != target
        assert not self.of(target) or self.of(target)[-1].position < begin or begin == 0
        for cell in self.of(source):
            if begin <= cell.position < end:
                cell.sequences.add(target)
        return bool(self.of(target)) and self.of(target)[-1].position == end - 1

    def clear(self, sequence: int) -> None:
        assert 0 <= sequence < self.sequences
        self._leave(sequence, self.of(sequence))

    def shift(self, sequence: int, keep: int, discard: int) -> bool:
        assert self.can_shift
        self._leave(sequence, [cell for cell in self.of(sequence) if keep <= cell.position < keep + discard])
        for cell in self.of(sequence):
            if cell.position >= keep + discard:
                assert cell.sequences == {sequence}, "a shared cell moves"
                cell.position -= discard
        return True

    def _leave(self, sequence: int, cells: list[Cell]) -> None:
        for cell in cells:
            cell.sequences.discard(sequence)
        self.cells = [cell for cell in self.cells if cell.sequences]


class FakeStates:
    """Copies of sequences: positions and tokens, eight bytes for each cell; what decoded them is in the high bits."""

    def __init__(self, memory: FakeMemory) -> None:
        self._memory = memory
        self._adapters: list[Scales | None] = []

    def size(self, sequence: int) -> int:
        return 8 * len(self._memory.of(sequence))

    def save(self, sequence: int, length: int, into: memoryview) -> bool:
        cells = self._memory.of(sequence)
        assert cells[-1].position == length - 1, "not what is to be saved"
        self._adapters += {cell.adapters for cell in cells} - set(self._adapters)
        tokens = [cell.token + VOCAB * self._adapters.index(cell.adapters) for cell in cells]
        numbers = [number for cell, token in zip(cells, tokens, strict=True) for number in (cell.position, token)]
        into[:] = array("i", numbers).tobytes()
        return True

    def restore(self, sequence: int, state: memoryview, length: int) -> bool:
        assert not self._memory.of(sequence), "a sequence that is not empty"
        numbers = array("i", state.tobytes())
        if len(self._memory.cells) + len(numbers) // 2 > self._memory.size:
            return False
        for position, token in zip(numbers[::2], numbers[1::2], strict=True):
            adapters = self._adapters[token // VOCAB]
            self._memory.cells.append(Cell(position, token % VOCAB, {sequence}, adapters))
        assert numbers[-2] == length - 1
        return True


class FakeSampler:
    def __init__(self, backend: FakeBackend, seed: int) -> None:
        self._backend = backend
        self._seed = seed
        self.freed = False

    def sample(self, row: int) -> int:
        assert not self.freed
        return successor(self._backend.seen[row], self._seed)

    def free(self) -> None:
        self.freed = True


class FakeBackend:
    """See the module."""

    def __init__(
        self,
        *,
        num_ctx: int = 24,
        slots: int = 3,
        spare: int = 4,
        capacity: int = 8,
        plain: bool = True,
        can_shift: bool = True,
        parked_bytes: int = 0,
        idle_tokens: int | None = None,
        idle_rows: int = 0,
        mixes: bool = True,
    ) -> None:
        self.mixes = mixes
        #: Seconds that decoding has taken, a millisecond a token.
        self.clock_s = 0.0
        self.num_ctx = num_ctx
        self.slots = slots
        self.sequences = slots + (spare if plain else 0)
        self.cells = num_ctx * slots
        self.rows = slots + 4
        self.batch = FakeBatch(max(capacity, slots))
        self.memory = FakeMemory(self.cells, self.sequences, plain=plain, can_shift=can_shift)
        self.states: SequenceStates | None = FakeStates(self.memory) if plain and parked_bytes else None
        self.parked_bytes = parked_bytes
        self.idle_tokens = self.cells if idle_tokens is None else idle_tokens
        self.idle_rows = idle_rows
        self.seen: dict[int, list[int]] = {}
        self.samplers: list[FakeSampler] = []
        self.decoded = 0
        self.batches: list[list[tuple[int, int, int, bool]]] = []
        self.fail_next = False
        self.adapters: Scales | None = None

    def adapt(self, scales: Scales | None) -> None:
        self.adapters = scales

    def decode(self) -> int:
        assert self.batch.tokens, "a step that decodes nothing"
        assert sum(sampled for *_, sampled in self.batch.tokens) <= self.rows, "more rows than there is room for"
        if self.fail_next:
            self.fail_next = False
            return FAILED
        if len(self.memory.cells) + len(self.batch.tokens) > self.memory.size:
            return NO_ROOM
        self.seen = {}
        for row, (token, position, sequence, sampled) in enumerate(self.batch.tokens):
            assert position == self.memory.length(sequence), "a token that does not follow the last one"
            assert position < self.num_ctx, "a position beyond the context"
            before = self.memory.of(sequence)
            assert all(cell.adapters == self.adapters for cell in before), "decoded with other adapters"
            self.memory.cells.append(Cell(position, token, {sequence}, self.adapters))
            if sampled:
                self.seen[row] = [cell.token for cell in self.memory.of(sequence)]
        self.decoded += len(self.batch.tokens)
        self.clock_s += len(self.batch.tokens) / 1000
        self.batches.append(list(self.batch.tokens))
        return DONE

    def sampler(self, sampling: frames_pb2.Sampling, prompt: array[int], *, seed: int) -> FakeSampler:
        self.samplers.append(FakeSampler(self, seed))
        return self.samplers[-1]

    def logits(self, row: int) -> int:
        raise AssertionError("nothing here has scores")


class FakeVocab:
    """Every token is a letter; `END` ends."""

    size = VOCAB

    def piece(self, token: int) -> bytes | None:
        return None if token == END else bytes([64 + token])


def spelled(tokens: Sequence[int]) -> str:
    """Return the text of an answer."""
    return "".join(chr(64 + token) for token in tokens)
