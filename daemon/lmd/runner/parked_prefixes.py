"""The prefix cache's second tier: idle prefixes whose state was moved out of the engine's memory, into RAM.

A prefix in the engine's memory costs every step: attention looks at its cells, and on a CPU even at masked ones. Moving
it out costs a copy, a hundredth of what reading its tokens anew would. What a prefix shares with one that is parked
already is not copied again: its state begins where the other's ends to be of use, and names that one as its base. So a
conversation that comes back a hundred times is copied once, piece by piece.

Only for memories with plain attention: any run of positions can be taken out of a sequence and put back there.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lmd.runner.prefix_cache import PrefixCache
from lmd.runner.scopes import uses_public
from lmd.runner.seams import SequenceMemory, SequenceStates

#: Fewer tokens than this are not worth a copy: the engine reads them in the time of a few steps.
WORTH_TOKENS = 32


@dataclass(slots=True, eq=False)
class Parked:
    """A prefix in RAM.

    Attributes:
        tokens: all of it, from position 0.
        scope: whose it is; None when everybody may use it.
        begin: the state holds the positions from here on.
        base: where the positions before *begin* are; None when there are none, or when they are manifest content,
            which stays in the engine's memory.
        bases: how many others have this one as their base.
        reach: the most of its tokens that any of them uses.
        used_at: when it was used last, in seconds since the epoch.
    """

    tokens: array[int]
    scope: str | None
    begin: int
    base: Parked | None
    state: bytearray
    bases: int = 0
    reach: int = 0
    pinned: bool = False
    used_at: float = 0.0

    @property
    def superseded(self) -> bool:
        """Whether others hold nearly all of it, too."""
        return self.reach > len(self.tokens) - WORTH_TOKENS

    def chain(self) -> list[Parked]:
        """Return this and what it builds on, the first positions first."""
        chain, link = [self], self.base
        while link is not None:
            chain.append(link)
            link = link.base
        return chain[::-1]


class ParkedPrefixes:
    """States in RAM, at most *budget_bytes* of them: what was used least recently goes first. Not thread-safe.

    *scratch* is a sequence of the memory that is used for nothing else.
    """

    def __init__(self, memory: SequenceMemory, states: SequenceStates, *, scratch: int, budget_bytes: int) -> None:
        #: Bytes of all states.
        self.total_bytes = 0
        self._memory = memory
        self._states = states
        self._scratch = scratch
        self._budget_bytes = budget_bytes
        self._index: PrefixCache[Parked] = PrefixCache()

    def __len__(self) -> int:
        """Return how many prefixes there are."""
        return len(self._index)

    def __iter__(self) -> Iterator[Parked]:
        """Iterate over the prefixes, those used last first."""
        return iter(self._index)

    def park(self, sequence: int, tokens: array[int], scope: str | None, *, resident: int) -> bool:
        """Copy what *sequence* holds, *tokens*; return whether it can be had back. The sequence stays as it is.

        The first *resident* tokens need no copy, since others keep them in the memory.
        """
        base, begin = self._index.match(tokens, scope, len(tokens))
        if base is not None and begin > len(tokens) - WORTH_TOKENS:
            self._touch(base)
            return True
        while base is not None and begin <= base.begin:
            base = base.base
        if begin < WORTH_TOKENS or begin <= resident:
            base, begin = None, resident if resident >= WORTH_TOKENS else 0
        if len(tokens) - begin < WORTH_TOKENS:
            return False
        state = self._copy(sequence, begin, len(tokens))
        if state is None:
            return False
        parked = Parked(tokens[:], scope, begin, base, state)
        if base is not None:
            base.bases += 1
            base.reach = max(base.reach, begin)
        self.total_bytes += len(state)
        self._index.insert(parked)
        self._touch(parked)
        while self.total_bytes > self._budget_bytes and (oldest := self._index.oldest()) is not None:
            self._drop(oldest)
        return True

    def find(self, prompt: array[int], scope: str, *, in_memory: int) -> tuple[Parked, int] | None:
        """Return what is worth putting back for *prompt*, and how many tokens they share.

        *in_memory* is how many the prompt finds without it. The last token of the prompt is never counted.
        """
        best: tuple[Parked, int] | None = None
        for whose in (scope, None) if uses_public(scope) else (scope,):
            parked, shared = self._index.match(prompt, whose, len(prompt) - 1)
            if parked is None or shared < (best[1] + 1 if best else in_memory + WORTH_TOKENS):
                continue
            if parked.chain()[0].begin <= in_memory:
                best = parked, shared
        if best is not None:
            self._touch(best[0])
        return best

    def restore(self, parked: Parked, length: int, sequence: int, *, held: int, make_room: Callable[[], bool]) -> int:
        """Put the first *length* tokens into a sequence that holds *held* of them; return how many it holds then.

        Nothing is put back when the sequence lacks what manifest content has to hold of it. *make_room* frees cells of
        the memory and returns whether it could. That parks others, for which *parked* itself may have left the index
        meanwhile.
        """
        chain = parked.chain()
        if chain[0].begin > held:
            return held
        ends = [*(min(following.begin, length) for following in chain[1:]), length]
        for link, end in zip(chain, ends, strict=True):
            if end <= held:
                continue
            while not self._states.restore(self._scratch, memoryview(link.state), len(link.tokens)):
                if not make_room():
                    return held
            extended = self._memory.extend(self._scratch, sequence, held, end)
            self._memory.clear(self._scratch)
            if not extended:
                return 0
            held = end
        return held

    def _copy(self, sequence: int, begin: int, end: int) -> bytearray | None:
        if begin and not self._memory.extend(sequence, self._scratch, begin, end):
            return None
        source = self._scratch if begin else sequence
        state = None
        size_bytes = self._states.size(source)
        if 0 < size_bytes <= self._budget_bytes:
            state = bytearray(size_bytes)
            if not self._states.save(source, end, memoryview(state)):
                state = None
        if begin:
            self._memory.clear(self._scratch)
        return state

    def _touch(self, parked: Parked) -> None:
        """Note a use. What others build on is never older than they are, so the oldest carries nobody."""
        for link in reversed(parked.chain()):
            self._index.touch(link)

    def _drop(self, parked: Parked) -> None:
        assert not parked.bases, "others build on it"
        self._index.remove(parked)
        self.total_bytes -= len(parked.state)
        if parked.base is not None:
            parked.base.bases -= 1
