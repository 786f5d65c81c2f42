"""Parts of a grammar without recursion as regular expressions, and whether reading one as long as possible is safe."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lmd.runner.gbnf import Chars, Choice, Name, Node, Range, Repeat, Sequence

_FIRST_NON_ASCII = 0x80


class Alphabet:
    """The characters that a grammar tells apart: a set of characters becomes an integer with a bit for each group."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        edges = {0, _FIRST_NON_ASCII}
        for node in nodes:
            for first, last in _ranges_in(node):
                edges.update((first, last + 1))
        self._edges = sorted(edges)
        self._other = -1 << bisect_left(self._edges, _FIRST_NON_ASCII)
        self._masks: dict[tuple[Range, ...], int] = {}

    def mask(self, chars: Chars) -> int:
        """Return the set."""
        mask = self._masks.get(chars.ranges)
        if mask is None:
            mask = 0
            for first, last in chars.ranges:
                low, high = bisect_left(self._edges, first), bisect_left(self._edges, last + 1)
                mask |= (1 << high) - (1 << low)
            self._masks[chars.ranges] = mask
        return mask

    def begin_alike(self, one: int, other: int) -> bool:
        """Tell whether characters of two sets may begin with the same byte.

        llguidance reads bytes: it goes on into a character beyond ASCII without knowing yet which one it is.
        """
        common = one & other & ~self._other
        return bool(common) or bool(one & self._other and other & self._other)


@dataclass(slots=True)
class Lexeme:
    """A regular expression and its position automaton: each position is one character of it.

    Attributes:
        masks: the characters of each position.
        first: positions that can come first, as bits.
        last: positions that can come last.
        following: for each position, those that can come after it.
        first_mask: the characters it can begin with.
    """

    regex: str
    masks: list[int]
    first: int
    last: int
    following: list[int]
    first_mask: int

    def union(self, positions: int) -> int:
        """Return the characters of some positions."""
        mask = 0
        for position in bits(positions):
            mask |= self.masks[position]
        return mask


def bits(number: int) -> Iterable[int]:
    """Yield which bits are set, lowest first."""
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


class LexemeMaker:
    """Makes lexemes of nodes; rules in *rules* are written out."""

    def __init__(self, rules: Mapping[str, Node], alphabet: Alphabet) -> None:
        self._rules = rules
        self._alphabet = alphabet
        self._regexes: dict[str, str] = {}

    def regex(self, node: Node) -> str:
        """Return a regular expression for a node, in the notation of Rust's regex crate."""
        if isinstance(node, Chars):
            return _class(node)
        if isinstance(node, Name):
            if node.name not in self._regexes:
                self._regexes[node.name] = self.regex(self._rules[node.name])
            return self._regexes[node.name]
        if isinstance(node, Sequence):
            return "".join(self._part(part) for part in node.parts)
        if isinstance(node, Choice):
            return "|".join(self.regex(option) for option in node.options)
        inner = self.regex(node.node)
        return (inner if isinstance(node.node, Chars) else f"(?:{inner})") + _counts(node)

    def _part(self, node: Node) -> str:
        """Return the expression of a node as it can stand beside others."""
        while isinstance(node, Name):
            node = self._rules[node.name]
        text = self.regex(node)
        return f"(?:{text})" if isinstance(node, Choice) else text

    def make(self, node: Node) -> Lexeme:
        """Return the lexeme of a node. Counted repetitions become open ones in its automaton."""
        lexeme = Lexeme(self.regex(node), [], 0, 0, [], 0)
        lexeme.first, lexeme.last, _ = self._add(lexeme, node)
        lexeme.first_mask = lexeme.union(lexeme.first)
        return lexeme

    def _add(self, lexeme: Lexeme, node: Node) -> tuple[int, int, bool]:
        """Add a node's positions; return its first ones, its last ones, and whether it may be empty."""
        if isinstance(node, Chars):
            position = 1 << len(lexeme.masks)
            lexeme.masks.append(self._alphabet.mask(node))
            lexeme.following.append(0)
            return position, position, False
        if isinstance(node, Name):
            return self._add(lexeme, self._rules[node.name])
        if isinstance(node, Choice):
            first, last, nullable = 0, 0, False
            for option in node.options:
                option_first, option_last, option_nullable = self._add(lexeme, option)
                first, last, nullable = first | option_first, last | option_last, nullable or option_nullable
            return first, last, nullable
        if isinstance(node, Sequence):
            first, last, nullable = 0, 0, True
            for part in node.parts:
                part_first, part_last, part_nullable = self._add(lexeme, part)
                for position in bits(last):
                    lexeme.following[position] |= part_first
                first = first | part_first if nullable else first
                last = last | part_last if part_nullable else part_last
                nullable = nullable and part_nullable
            return first, last, nullable
        first, last, nullable = self._add(lexeme, node.node)
        if node.most != 1:
            for position in bits(last):
                lexeme.following[position] |= first
        return first, last, nullable or node.least == 0


class TooMuchWork(Exception):
    """Raised when comparing lexemes takes more steps than it is worth."""


class Budget:
    """Steps of work that are left."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def spend(self, steps: int) -> None:
        """Take some.

        Raises:
            TooMuchWork: there are none left.
        """
        self._steps -= steps
        if self._steps < 0:
            raise TooMuchWork


def carries_on(one: Lexeme, other: Lexeme, after: int, alphabet: Alphabet, budget: Budget) -> bool:
    """Tell whether *other* might go on after a text of *one* with a character out of *after*, which may follow it."""
    budget.spend(1)
    if not after or not one.first_mask & other.first_mask:
        return False
    seen: set[tuple[int, int]] = set()
    todo = [(mine, its) for mine in bits(one.first) for its in bits(other.first) if one.masks[mine] & other.masks[its]]
    while todo:
        pair = todo.pop()
        if pair in seen:
            continue
        seen.add(pair)
        budget.spend(1)
        mine, its = pair
        if one.last >> mine & 1 and alphabet.begin_alike(other.union(other.following[its]), after):
            return True
        todo.extend(
            (next_mine, next_its)
            for next_mine in bits(one.following[mine])
            for next_its in bits(other.following[its])
            if one.masks[next_mine] & other.masks[next_its] and (next_mine, next_its) not in seen
        )
    return False


def _ranges_in(node: Node) -> Iterable[Range]:
    if isinstance(node, Chars):
        yield from node.ranges
    elif isinstance(node, Repeat):
        yield from _ranges_in(node.node)
    elif isinstance(node, Sequence | Choice):
        for child in node.parts if isinstance(node, Sequence) else node.options:
            yield from _ranges_in(child)


def _class(chars: Chars) -> str:
    """Return a class in which nothing but letters, digits and code points stands, so that nothing has a meaning."""
    parts = []
    for first, last in chars.ranges:
        parts.append(_character(first) if first == last else f"{_character(first)}-{_character(last)}")
    if len(parts) == 1 and chars.ranges[0][0] == chars.ranges[0][1]:
        return parts[0]
    return f"[{''.join(parts)}]"


def _character(code: int) -> str:
    character = chr(code)
    return character if character.isascii() and character.isalnum() else f"\\x{{{code:x}}}"


def _counts(repeat: Repeat) -> str:
    most = "" if repeat.most is None else repeat.most
    return f"{{{repeat.least},{most}}}"
