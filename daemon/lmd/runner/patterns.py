"""Many texts looked for at once in a stream.

The texts are sorted, so that those with a common beginning are neighbours, and a place among them is a range. A prefix
tree grows from that along the paths that a stream takes: a list of a thousand texts costs what the stream has of their
beginnings, not what they add up to.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable

_LAST_CHARACTER = 0x10FFFF


class Node:
    """A place in the prefix tree: the texts that begin alike, and whether what they share is one of them.

    Attributes:
        depth: how many characters they share.
        complete: whether these characters are one of the texts.
    """

    __slots__ = ("_next", "_texts", "complete", "depth", "high", "low")

    def __init__(self, texts: list[str], low: int, high: int, depth: int) -> None:
        self._texts = texts
        self.low = low
        self.high = high
        self.depth = depth
        self.complete = low < high and len(texts[low]) == depth
        self._next: dict[str, Node] = {}

    def step(self, character: str) -> Node | None:
        """Return the place one character on, or None when no text goes on like that."""
        node = self._next.get(character)
        if node is None and (node := self._find(character)) is not None:
            # What leads nowhere is not remembered: a stream may have any character, and the tree stays small.
            self._next[character] = node
        return node

    def _find(self, character: str) -> Node | None:
        depth = self.depth
        prefix = self._texts[self.low][:depth]
        low = bisect_left(self._texts, prefix + character, self.low, self.high)
        if low == self.high or self._texts[low][depth : depth + 1] != character:
            return None
        high = self.high
        if ord(character) < _LAST_CHARACTER:
            high = bisect_left(self._texts, prefix + chr(ord(character) + 1), low, self.high)
        return Node(self._texts, low, high, depth + 1)


class Patterns:
    """A set of texts to look for. The empty text is not looked for.

    Attributes:
        root: where all of them begin; None when there are none.
        firsts: the characters they begin with.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        found = sorted({text for text in texts if text})
        self.root = Node(found, 0, len(found), 0) if found else None
        self.firsts = frozenset(text[0] for text in found)
        self._first = re.compile(f"[{''.join(map(re.escape, sorted(self.firsts)))}]") if found else None

    def next_start(self, text: str, position: int) -> int:
        """Return where from *position* on a text may begin; the length of *text* when nowhere."""
        found = self._first.search(text, position) if self._first is not None else None
        return found.start() if found is not None else len(text)


class Scan:
    """Reads a stream and tells where texts begin and end in it. Positions count from the beginning of the stream.

    Attributes:
        position: characters read.
        live: where texts may have begun that are not complete yet, oldest first.
    """

    def __init__(self, patterns: Patterns) -> None:
        self._patterns = patterns
        self.position = 0
        self.live: list[tuple[int, Node]] = []

    def feed(self, text: str) -> tuple[int, int] | None:
        """Read *text* up to where the first text is complete; return where that begins and ends.

        Of those complete at the same character it is the longest. What comes after it in *text* is not read.
        """
        root = self._patterns.root
        if root is None:
            self.position += len(text)
            return None
        base, size = self.position, len(text)
        index = 0
        # The list is replaced and never written to, so that a shallow copy of this reads on by itself.
        live, firsts = list(self.live), self._patterns.firsts
        while index < size:
            if not live:
                index = self._patterns.next_start(text, index)
                if index == size:
                    break
            character = text[index]
            if character in firsts:
                live.append((base + index, root))
            index += 1
            live = [(start, node) for start, before in live if (node := before.step(character)) is not None]
            for start, node in live:
                if node.complete:
                    self.live = live
                    self.position = base + index
                    return start, self.position
        self.live = live
        self.position = base + size
        return None
