"""Who uses which sequence: slots decode, the others are prefix cache, which goes on in RAM and on disk.

A request starts from the longest beginning of its prompt that is in memory, whether nobody uses it or somebody still
decodes it: with plain attention a copy only marks cells as shared. Beginnings are private to a scope, except for what
the model's manifest puts before every chat. What nobody decodes is parked in RAM when it is in the way, and put back
when a prompt begins with it; what is in neither may be saved on disk.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field

from lmd.runner.parked_prefixes import Parked, ParkedPrefixes
from lmd.runner.prefix_cache import Entry, PrefixCache, common_prefix
from lmd.runner.saved_prefixes import Candidate, SavedPrefixes
from lmd.runner.scopes import uses_public
from lmd.runner.seams import SequenceMemory, SequenceStates

# A prompt that shares this part of a sequence's tokens is taken for their continuation, where copies are not free.
_CONTINUES = 0.5

#: Shorter manifest content is not worth a sequence of its own.
WORTH_PINNING = 16


@dataclass(slots=True, eq=False)
class Slot:
    """A sequence that is being decoded.

    Attributes:
        tokens: what the memory holds, by position.
        scope: whose tokens they are.
        shared_to: positions before this may lie in cells that other sequences use, too.
        cached: tokens that were there when the slot was taken.
        faithful: whether decoding the tokens anew would give the same memory; false after a shift.
    """

    sequence: int
    scope: str
    tokens: array[int] = field(default_factory=lambda: array("i"))
    shared_to: int = 0
    cached: int = 0
    faithful: bool = True


class Slots:
    """The sequences of a memory. Not thread-safe.

    Attributes:
        manifest: the tokens that the manifest puts before every chat; shared by all scopes.
    """

    def __init__(
        self,
        memory: SequenceMemory,
        count: int,
        *,
        sequences: int,
        budget_tokens: int,
        saved: SavedPrefixes | None = None,
        states: SequenceStates | None = None,
        parked_bytes: int = 0,
        idle_tokens: int | None = None,
        idle_rows: int = 0,
    ) -> None:
        """Share out *sequences*, of which *count* are decoded at once.

        At most *budget_tokens* stay in memory, and at most *idle_tokens* of prefixes while others are decoded; each
        may stay for *idle_rows* of them all the same. With *states* what has to go is parked in *parked_bytes* of RAM,
        which takes a sequence.
        """
        self.manifest: array[int] = array("i")
        self._saved = saved
        self._memory = memory
        self._count = count
        self._budget_tokens = budget_tokens
        self._idle_tokens = budget_tokens if idle_tokens is None else idle_tokens
        self._parked: ParkedPrefixes | None = None
        if states is not None and parked_bytes and sequences > count:
            sequences -= 1
            self._parked = ParkedPrefixes(memory, states, scratch=sequences, budget_bytes=parked_bytes)
        self._idle_rows = idle_rows
        self._decoded_rows = 0
        self._free = list(range(sequences - 1, -1, -1))
        self._busy: list[Slot] = []
        self._cache: PrefixCache[Entry] = PrefixCache()

    @property
    def busy_count(self) -> int:
        """Slots that serve a request."""
        return len(self._busy)

    @property
    def cached_count(self) -> int:
        """Prefixes that are kept for later, in memory or parked."""
        return len(self._cache) + (len(self._parked) if self._parked is not None else 0)

    @property
    def parked_bytes(self) -> int:
        """What parked prefixes take."""
        return self._parked.total_bytes if self._parked is not None else 0

    @property
    def used_tokens(self) -> int:
        """About how many cells hold something: what slots share with others is counted once."""
        return self._cache.tokens + sum(len(slot.tokens) - min(slot.cached, len(slot.tokens)) for slot in self._busy)

    def any_idle(self) -> bool:
        """Tell whether a request could be taken."""
        return len(self._busy) < self._count

    def longest_prefix(self, prompt: array[int], scope: str) -> int:
        """Return how many tokens a prompt would find in memory."""
        return self._best(prompt, scope)[1]

    def shareable(self, prompt: array[int], scope: str, other: array[int], other_scope: str) -> int:
        """Return how many first tokens of *prompt* the other prompt's sequence could give it."""
        limit = len(prompt) - 1
        if scope != other_scope:
            if not (uses_public(scope) and uses_public(other_scope)):
                return 0
            limit = min(limit, common_prefix(self.manifest, prompt, limit))
        return common_prefix(other, prompt, limit)

    def take(self, prompt: array[int], scope: str, *, reuse: bool = True) -> Slot | None:
        """Return a slot that holds as much of the beginning of *prompt* as can be had, or None when all are busy.

        The last token of the prompt is never among them: decoding it is what yields the first new token. Without
        *reuse* the slot is empty.
        """
        if not self.any_idle():
            return None
        source, shared = self._best(prompt, scope) if reuse else (None, 0)
        if reuse and self._unpark(prompt, scope, source, in_memory=shared):
            source, shared = self._best(prompt, scope)
        if reuse and self._restore(prompt, scope, in_memory=shared):
            source, shared = self._best(prompt, scope)
        if isinstance(source, Entry) and not source.pinned and self._takes_over(source, shared, prompt):
            slot = self._take_over(source, shared, scope)
        else:
            slot = self._start_from(source, shared, scope)
        slot.cached = len(slot.tokens)
        self._busy.append(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back; its tokens stay for later prompts unless others hold them as well."""
        self._busy.remove(slot)
        if not slot.tokens or not slot.faithful:
            self._drop(slot.sequence)
            return
        if self._memory.shares_freely:
            longer, shared = self._cache.match(slot.tokens, slot.scope, len(slot.tokens))
            if longer is not None and shared == len(slot.tokens):
                self._cache.touch(longer)
                self._drop(slot.sequence)
                return
            for entry in self._cache.beginnings(slot.tokens, slot.scope):
                self._forget_entry(entry)
        entry = Entry(slot.sequence, slot.tokens, slot.scope, slot.shared_to, idle_since=self._decoded_rows)
        self._cache.insert(entry)
        while self._cache.tokens > self._budget_tokens and self._evict_oldest():
            pass

    def clear_the_way(self, rows: int) -> None:
        """Park what lies in the memory for nobody, before *rows* are decoded: all would have to look at it."""
        if self._parked is None:
            return
        self._decoded_rows += rows
        # What is private begins with the pinned tokens, too, and is counted with them: about right is good enough.
        while self._cache.tokens - self._cache.pinned_tokens > self._idle_tokens:
            oldest = self._cache.oldest()
            if oldest is None or self._decoded_rows - oldest.idle_since <= self._idle_rows:
                return
            self._evict(oldest)

    def pin_manifest(self, slot: Slot) -> None:
        """Keep the manifest's beginning of what *slot* holds, for everybody, unless it is kept already."""
        length = len(self.manifest)
        if length < WORTH_PINNING or not self._memory.shares_freely or slot.tokens[:length] != self.manifest:
            return
        if not uses_public(slot.scope):
            return
        if self._cache.match(self.manifest, None, length)[1] == length:
            return
        sequence = self._allocate()
        if sequence is None:
            return
        if not self._memory.copy(slot.sequence, sequence, length):
            self._free.append(sequence)
            return
        slot.shared_to = max(slot.shared_to, length)
        self._cache.insert(Entry(sequence, self.manifest[:], None, length, pinned=True))

    def forget(self, slot: Slot) -> None:
        """Drop what a slot holds: nobody knows any more what that is."""
        self._memory.clear(slot.sequence)
        slot.tokens, slot.shared_to, slot.cached = array("i"), 0, 0

    def save(self, allowed_s: float) -> None:
        """Save what is kept for later, in about *allowed_s*. Nothing may be decoded any more.

        What is parked goes through the memory once more: a file holds a whole prefix, whatever it was made of.
        """
        if self._saved is None:
            return
        deadline = time.monotonic() + allowed_s
        entries = list(self._cache)
        self._saved.save([_candidate(entry) for entry in entries], allowed_s=allowed_s)
        for entry in entries:
            # Room for what is parked, none of which has to be parked again.
            if not entry.pinned:
                self._forget_entry(entry)
        for parked in list(self._parked or ()):
            if parked.superseded or (left_s := deadline - time.monotonic()) <= 0:
                continue
            begin = parked.chain()[0].begin
            # What a prefix has of the manifest, if it has that from there, is not parked with it.
            manifest, held = self._cache.match(parked.tokens, None, begin)
            back = self._bring_back(parked, len(parked.tokens), manifest, held)
            if back is not None:
                if len(back.tokens) == len(parked.tokens):
                    self._saved.save([_candidate(back, used_at=parked.used_at)], allowed_s=left_s)
                self._forget_entry(back)

    def make_room(self) -> bool:
        """Drop the prefix that was not used for the longest time; return whether there was any."""
        entry = self._cache.oldest() or self._cache.oldest_pinned()
        if entry is not None:
            self._evict(entry)
        return entry is not None

    def _unpark(self, prompt: array[int], scope: str, source: Entry | Slot | None, *, in_memory: int) -> bool:
        """Put back what is parked, as an entry like any other, if that is notably more of a prompt than *source* has.

        Return whether entries have changed.
        """
        match = self._parked.find(prompt, scope, in_memory=in_memory) if self._parked is not None else None
        if match is None:
            return False
        self._bring_back(*match, source, in_memory)
        return True

    def _bring_back(self, parked: Parked, length: int, source: Entry | Slot | None, held: int) -> Entry | None:
        """Make an entry of the first *length* tokens of what is parked, of which *source* holds the first *held*."""
        assert self._parked is not None, "something is parked"
        sequence = self._allocate(besides=source)
        if sequence is None:
            return None
        if source is not None and held and self._memory.copy(source.sequence, sequence, held):
            source.shared_to = max(source.shared_to, held)
        else:
            held = 0
            self._memory.clear(sequence)
        shared_to = held
        while self.used_tokens + length - held > self._budget_tokens and self._evict_oldest(besides=source):
            pass
        held = self._parked.restore(
            parked, length, sequence, held=held, make_room=lambda: self._evict_oldest(besides=source)
        )
        if not held:
            self._drop(sequence)
            return None
        entry = Entry(sequence, parked.tokens[:held], parked.scope, shared_to, pinned=parked.scope is None)
        self._cache.insert(entry)
        return entry

    def _restore(self, prompt: array[int], scope: str, *, in_memory: int) -> bool:
        """Put back what was saved, as an entry like any other, if a prompt has notably more use for it.

        Return whether entries have changed: room may have been made in vain.
        """
        match = self._saved.find(prompt, scope, in_memory=in_memory) if self._saved is not None else None
        if self._saved is None or match is None:
            return False
        sequence = self._allocate()
        if sequence is None:
            return False
        saved, _ = match
        while self.used_tokens + len(saved.tokens) > self._budget_tokens and self._evict_oldest():
            pass
        if self._saved.restore(saved, sequence, make_room=self._evict_oldest):
            # A copy: a slot that takes it over goes on writing to its tokens.
            self._cache.insert(Entry(sequence, saved.tokens[:], None if saved.public else scope, pinned=saved.public))
        else:
            self._free.append(sequence)
        return True

    def _evict_oldest(self, *, besides: Entry | Slot | None = None) -> bool:
        entry = self._cache.oldest(besides=besides)
        if entry is not None:
            self._evict(entry)
        return entry is not None

    def _best(self, prompt: array[int], scope: str) -> tuple[Entry | Slot | None, int]:
        """Return the sequence to start from, and how many of its tokens."""
        if not self._memory.shares_freely:
            return self._best_of_few(prompt, scope)
        best: Entry | Slot | None
        best, longest = self._cache.match(prompt, scope, len(prompt) - 1)
        if uses_public(scope):
            entry, shared = self._cache.match(prompt, None, len(prompt) - 1)
            if shared > longest:
                best, longest = entry, shared
        for slot in self._busy:
            shared = self.shareable(prompt, scope, slot.tokens, slot.scope)
            if shared > longest and slot.faithful:
                best, longest = slot, shared
        return best, longest

    def _best_of_few(self, prompt: array[int], scope: str) -> tuple[Entry | Slot | None, int]:
        """As `_best`, where the memory itself has to say what can be used of each sequence."""
        best: Entry | Slot | None = None
        longest = 0
        for entry in self._cache:
            if entry.scope != scope:
                continue
            shared = common_prefix(entry.tokens, prompt, len(prompt) - 1)
            shared = self._memory.reusable(entry.sequence, len(entry.tokens), shared, idle=True)
            if shared > longest:
                best, longest = entry, shared
        for slot in self._busy:
            if slot.scope != scope or not slot.faithful:
                continue
            shared = common_prefix(slot.tokens, prompt, len(prompt) - 1)
            shared = self._memory.reusable(slot.sequence, len(slot.tokens), shared, idle=False)
            if shared > longest:
                best, longest = slot, shared
        return best, longest

    def _takes_over(self, entry: Entry, shared: int, prompt: array[int]) -> bool:
        """Tell whether a prompt leaves little use for an entry's tokens beyond those they share.

        It does when there are none, or when it was asked before: then they are an answer given once. Where a copy takes
        another entry's place, going on from most of them is enough.
        """
        if shared == len(entry.tokens) or shared == len(prompt) - 1:
            return True
        return not self._memory.shares_freely and (
            shared >= _CONTINUES * len(entry.tokens) or (not self._free and self._cache.oldest() is entry)
        )

    def _take_over(self, entry: Entry, shared: int, scope: str) -> Slot:
        self._cache.remove(entry)
        tokens = entry.tokens
        if shared < len(tokens):
            tokens = tokens[:shared] if self._memory.keep(entry.sequence, shared) else array("i")
        return Slot(entry.sequence, scope, tokens, min(entry.shared_to, len(tokens)))

    def _start_from(self, source: Entry | Slot | None, shared: int, scope: str) -> Slot:
        sequence = self._allocate(besides=source)
        if sequence is None:
            assert isinstance(source, Entry), "all sequences but the source are busy, and one is not"
            return self._take_over(source, shared, scope)
        slot = Slot(sequence, scope)
        if source is None:
            self._memory.clear(sequence)
        elif self._memory.copy(source.sequence, sequence, shared):
            slot.tokens = source.tokens[:shared]
            slot.shared_to = shared
            source.shared_to = max(source.shared_to, shared)
            if isinstance(source, Entry):
                self._cache.touch(source)
        return slot

    def _allocate(self, *, besides: Entry | Slot | None = None) -> int | None:
        """Return a sequence nobody uses, at the cost of the oldest entry if need be."""
        if not self._free:
            entry = self._cache.oldest(besides=besides) or self._cache.oldest_pinned(besides=besides)
            if entry is None:
                return None
            self._evict(entry)
        return self._free.pop()

    def _evict(self, entry: Entry) -> None:
        """Take an entry out of the memory; it can be had back if it is worth that."""
        if self._parked is not None:
            # Private prefixes begin with manifest content that stays; what is pinned itself is copied whole.
            public = not entry.pinned and uses_public(entry.scope)
            pinned = self._cache.match(entry.tokens, None, len(entry.tokens))[1] if public else 0
            self._parked.park(entry.sequence, entry.tokens, entry.scope, resident=pinned)
        self._forget_entry(entry)

    def _forget_entry(self, entry: Entry) -> None:
        self._cache.remove(entry)
        self._drop(entry.sequence)

    def _drop(self, sequence: int) -> None:
        self._memory.clear(sequence)
        self._free.append(sequence)


def _candidate(entry: Entry, *, used_at: float | None = None) -> Candidate:
    return Candidate(
        entry.sequence,
        entry.tokens,
        entry.scope or "",
        entry.scope is None,
        entry.used_at if used_at is None else used_at,
    )
