"""The prefix cache's index: which token sequences are in memory, by scope, in radix trees.

A tree's edges are runs of tokens, so a prompt is compared with all sequences of its scope at once, and the tokens in
the tree, each shared run counted once, are about the KV cells that they take. Pure: it moves no data.
"""

from __future__ import annotations

import collections
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

_TOKEN_BYTES = array("i").itemsize


class Kept(Protocol):
    """What the index has to know of what it finds."""

    @property
    def tokens(self) -> array[int]:
        """Which tokens it stands for, from position 0."""

    @property
    def scope(self) -> str | None:
        """Whose it is; None when everybody may use it."""

    @property
    def pinned(self) -> bool:
        """Whether it stays until nothing else is left to evict."""

    used_at: float


K = TypeVar("K", bound=Kept)


@dataclass(slots=True, eq=False)
class Entry:
    """A sequence that nobody decodes.

    Attributes:
        tokens: what the memory holds of it, by position.
        scope: whose it is; None when everybody may use it.
        shared_to: positions before this may lie in cells that other sequences use, too.
        pinned: whether it stays until nothing else is left to evict.
        used_at: when it was used last, in seconds since the epoch.
        idle_since: how many rows had been decoded when it was left.
    """

    sequence: int
    tokens: array[int]
    scope: str | None
    shared_to: int = 0
    pinned: bool = False
    used_at: float = 0.0
    idle_since: int = 0


class PrefixCache(Generic[K]):
    """Entries by scope and tokens, and the order in which they were used. Not thread-safe."""

    def __init__(self) -> None:
        self._trees: dict[str | None, _Tree[K]] = {}
        # Pinned ones are not in here.
        self._used: collections.OrderedDict[K, None] = collections.OrderedDict()
        self._pinned: list[K] = []

    def __len__(self) -> int:
        """Return how many entries there are."""
        return len(self._used) + len(self._pinned)

    def __iter__(self) -> Iterator[K]:
        """Iterate over the entries, those used last first, pinned ones last."""
        yield from reversed(self._used)
        yield from self._pinned

    @property
    def pinned_tokens(self) -> int:
        """Tokens of the pinned entries."""
        return sum(len(entry.tokens) for entry in self._pinned)

    @property
    def tokens(self) -> int:
        """Tokens of all entries; what entries of one scope share counts once."""
        return sum(tree.tokens for tree in self._trees.values())

    def insert(self, entry: K) -> None:
        """Add an entry, as the one used last."""
        entry.used_at = time.time()
        self._trees.setdefault(entry.scope, _Tree()).insert(entry)
        if entry.pinned:
            self._pinned.append(entry)
        else:
            self._used[entry] = None

    def remove(self, entry: K) -> None:
        """Take an entry out."""
        tree = self._trees[entry.scope]
        tree.remove(entry)
        if tree.is_empty:
            del self._trees[entry.scope]
        if entry.pinned:
            self._pinned.remove(entry)
        else:
            del self._used[entry]

    def touch(self, entry: K) -> None:
        """Note that an entry was used."""
        entry.used_at = time.time()
        if not entry.pinned:
            self._used.move_to_end(entry)

    def match(self, prompt: array[int], scope: str | None, limit: int) -> tuple[K | None, int]:
        """Return an entry of *scope* that shares the most first tokens with *prompt*, and how many: at most *limit*.

        Of several, one that ends there is preferred.
        """
        tree = self._trees.get(scope)
        return tree.match(prompt[: max(0, limit)].tobytes()) if tree is not None else (None, 0)

    def beginnings(self, tokens: array[int], scope: str | None) -> list[K]:
        """Return the entries of *scope* whose tokens are a beginning of *tokens*, equal ones included."""
        tree = self._trees.get(scope)
        return tree.beginnings(tokens.tobytes()) if tree is not None else []

    def oldest(self, *, besides: object = None) -> K | None:
        """Return the entry that was not used for the longest time and is not pinned."""
        return next((entry for entry in self._used if entry is not besides), None)

    def oldest_pinned(self, *, besides: object = None) -> K | None:
        """Return the pinned entry that is there longest."""
        return next((entry for entry in self._pinned if entry is not besides), None)


class _Node(Generic[K]):
    __slots__ = ("children", "edge", "entries", "parent")

    def __init__(self, edge: bytes, parent: _Node[K] | None) -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[bytes, _Node[K]] = {}
        self.entries: list[K] = []


class _Tree(Generic[K]):
    """A radix tree over the bytes of token arrays; every cut is between two tokens."""

    def __init__(self) -> None:
        self._root: _Node[K] = _Node(b"", None)
        self._nodes: dict[K, _Node[K]] = {}
        self.tokens = 0

    @property
    def is_empty(self) -> bool:
        return not self._nodes

    def insert(self, entry: K) -> None:
        node, rest = self._root, entry.tokens.tobytes()
        while rest:
            child = node.children.get(rest[:_TOKEN_BYTES])
            if child is None:
                child = _Node(rest, node)
                node.children[rest[:_TOKEN_BYTES]] = child
                self.tokens += len(rest) // _TOKEN_BYTES
                node, rest = child, b""
                continue
            shared = _common_bytes(child.edge, rest)
            if shared < len(child.edge):
                child = self._split(child, shared)
            node, rest = child, rest[shared:]
        node.entries.append(entry)
        self._nodes[entry] = node

    def remove(self, entry: K) -> None:
        node = self._nodes.pop(entry)
        node.entries.remove(entry)
        while node.parent is not None and not node.entries and not node.children:
            parent = node.parent
            del parent.children[node.edge[:_TOKEN_BYTES]]
            self.tokens -= len(node.edge) // _TOKEN_BYTES
            node = parent
        if node.parent is not None and not node.entries and len(node.children) == 1:
            (child,) = node.children.values()
            child.edge = node.edge + child.edge
            child.parent = node.parent
            node.parent.children[child.edge[:_TOKEN_BYTES]] = child

    def match(self, data: bytes) -> tuple[K | None, int]:
        node, rest = self._root, data
        while rest:
            child = node.children.get(rest[:_TOKEN_BYTES])
            if child is None:
                break
            shared = _common_bytes(child.edge, rest)
            node, rest = child, rest[shared:]
            if shared < len(child.edge):
                break
        length = (len(data) - len(rest)) // _TOKEN_BYTES
        if not length:
            return None, 0
        while not node.entries:
            node = next(iter(node.children.values()))
        return node.entries[-1], length

    def beginnings(self, data: bytes) -> list[K]:
        found: list[K] = []
        node: _Node[K] | None = self._root
        rest = data
        while node is not None and rest:
            node = node.children.get(rest[:_TOKEN_BYTES])
            if node is None or not rest.startswith(node.edge):
                break
            found += node.entries
            rest = rest[len(node.edge) :]
        return found

    def _split(self, node: _Node[K], at: int) -> _Node[K]:
        """Cut a node's edge in two; return the new node in the middle."""
        assert node.parent is not None, "the root has no edge"
        middle = _Node(node.edge[:at], node.parent)
        node.parent.children[middle.edge[:_TOKEN_BYTES]] = middle
        node.edge, node.parent = node.edge[at:], middle
        middle.children[node.edge[:_TOKEN_BYTES]] = node
        return middle


def _common_bytes(one: bytes, other: bytes) -> int:
    """Return how many first bytes are equal, cut to whole tokens."""
    low, high = 0, min(len(one), len(other)) // _TOKEN_BYTES
    if one[: high * _TOKEN_BYTES] == other[: high * _TOKEN_BYTES]:
        return high * _TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * _TOKEN_BYTES : middle * _TOKEN_BYTES] == other[low * _TOKEN_BYTES : middle * _TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low * _TOKEN_BYTES


def common_prefix(one: array[int], other: array[int], limit: int) -> int:
    """Return how many first tokens are equal, at most *limit*."""
    limit = max(0, limit)
    return _common_bytes(one[:limit].tobytes(), other[:limit].tobytes()) // _TOKEN_BYTES
