"""Prompts that have a model fill a gap, made of the tokens it was trained with for that."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from lmd.runner.vocab import InsertTokens, Vocab

#: The share of a prompt that what comes after the gap may take when not all fits.
_SUFFIX_SHARE = 4


@dataclass(frozen=True, slots=True)
class Gap:
    """The tokens on both sides of a gap."""

    before: array[int]
    after: array[int]
    marks: InsertTokens
    start: array[int]

    @property
    def size(self) -> int:
        """Tokens of the whole prompt."""
        return len(self.start) + 3 + len(self.before) + len(self.after)

    def prompt(self, room: int | None = None) -> array[int]:
        """Return the prompt: prefix, suffix, middle, the order that all families know.

        With *room*, the texts lose what is farthest from the gap, until the prompt has no more than so many tokens.
        """
        before, after = self.before, self.after
        if room is not None and self.size > room:
            room = max(0, room - len(self.start) - 3)
            after = after[: max(room // _SUFFIX_SHARE, room - len(before))]
            before = before[len(before) - min(len(before), room - len(after)) :]
        marks = self.marks
        return self.start + array("i", [marks.before, *before, marks.after, *after, marks.gap])


def read_gap(vocab: Vocab, marks: InsertTokens, prefix: bytes, suffix: bytes) -> Gap:
    """Tokenize what is around a gap. Text that names a special token stays text: it is somebody's document."""
    before = vocab.tokenize(prefix, add_special=False, parse_special=False)
    after = vocab.tokenize(suffix, add_special=False, parse_special=False)
    start = array("i", [vocab.bos] if vocab.adds_bos and vocab.bos >= 0 else [])
    return Gap(before, after, marks, start)
