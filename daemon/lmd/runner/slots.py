"""The slots: sequences of the context, the tokens they hold, and which of them a new prompt can start from."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Protocol

# A prompt that shares this part of a slot's tokens is taken for their continuation.
_CONTINUES = 0.5


class SequenceMemory(Protocol):
    """What the slots need of `Memory`."""

    def reusable(self, sequence: int, length: int, shared: int, *, idle: bool) -> int:
        """Return how many of the shared first positions can be started from."""

    def keep(self, sequence: int, length: int) -> bool:
        """Cut a sequence."""

    def copy(self, source: int, target: int, length: int) -> bool:
        """Copy the beginning of a sequence."""

    def clear(self, sequence: int) -> None:
        """Drop a sequence."""


@dataclass(slots=True)
class Slot:
    """One sequence.

    Attributes:
        tokens: what the memory holds, by position; stays after a request as prefix cache.
        scope: whose tokens they are; nobody else may start from them.
        used_at: a count that grows with every use.
    """

    sequence: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    scope: str = ""
    used_at: int = 0
    busy: bool = False


class Slots:
    """All slots of a context. Not thread-safe."""

    def __init__(self, memory: SequenceMemory, count: int) -> None:
        self._memory = memory
        self._slots = [Slot(sequence) for sequence in range(count)]
        self._uses = 0

    @property
    def busy_count(self) -> int:
        """Slots that serve a request."""
        return sum(slot.busy for slot in self._slots)

    def any_idle(self) -> bool:
        """Tell whether a request could be taken."""
        return any(not slot.busy for slot in self._slots)

    def longest_prefix(self, prompt: array[int], scope: str) -> int:
        """Return how many tokens a prompt would find in memory."""
        return self._best(prompt, scope)[1]

    def take(self, prompt: array[int], scope: str) -> Slot | None:
        """Return a slot that holds as much of the beginning of *prompt* as can be had, or None when all are busy.

        The last token of the prompt is never among them: decoding it is what yields the first new token. Tokens come
        from the slot itself or, shared, from any other one of the same scope, also from one that is busy.
        """
        idle = [slot for slot in self._slots if not slot.busy]
        if not idle:
            return None
        source, shared = self._best(prompt, scope)
        oldest = min(idle, key=lambda slot: (len(slot.tokens) > 0, slot.used_at))
        if source is None:
            slot = oldest
            self._reset(slot)
        elif not source.busy and (source is oldest or _supersedes(prompt, source, shared)):
            slot = source
            kept = self._memory.keep(slot.sequence, shared)
            slot.tokens = slot.tokens[:shared] if kept else array("i")
        else:
            slot = oldest
            copied = self._memory.copy(source.sequence, slot.sequence, shared)
            slot.tokens = source.tokens[:shared] if copied else array("i")
        slot.scope = scope
        slot.busy = True
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back; its tokens stay for the next prompt."""
        self._uses += 1
        slot.used_at = self._uses
        slot.busy = False

    def forget(self, slot: Slot) -> None:
        """Drop a slot's tokens: nobody knows any more what the memory holds of them."""
        self._reset(slot)

    def forget_idle(self) -> bool:
        """Drop what is kept only as prefix cache; return whether there was any."""
        idle = [slot for slot in self._slots if not slot.busy and slot.tokens]
        for slot in idle:
            self._reset(slot)
        return bool(idle)

    def _reset(self, slot: Slot) -> None:
        self._memory.clear(slot.sequence)
        slot.tokens = array("i")

    def _best(self, prompt: array[int], scope: str) -> tuple[Slot | None, int]:
        best: Slot | None = None
        longest = 0
        for slot in self._slots:
            if slot.scope != scope or not slot.tokens:
                continue
            shared = common_prefix(slot.tokens, prompt, len(prompt) - 1)
            if shared > longest or (shared == longest > 0 and not slot.busy):
                shared = self._memory.reusable(slot.sequence, len(slot.tokens), shared, idle=not slot.busy)
                if shared >= longest and shared > 0:
                    best, longest = slot, shared
        return best, longest


def _supersedes(prompt: array[int], slot: Slot, shared: int) -> bool:
    """Tell whether a prompt leaves little use for the tokens of a slot beyond those they share.

    It does when it goes on from most of them, or when it was asked before: then the rest is an answer given once.
    """
    return shared >= _CONTINUES * len(slot.tokens) or shared == len(prompt) - 1


def common_prefix(one: array[int], other: array[int], limit: int) -> int:
    """Return how many first elements are equal, at most *limit*; compares memory, not Python objects."""
    low, high = 0, max(0, min(len(one), len(other), limit))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
