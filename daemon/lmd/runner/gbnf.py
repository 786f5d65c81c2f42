"""Reads GBNF, llama.cpp's notation for grammars.

A grammar is a list of rules, `name ::= alternatives`; `root` is the start. Alternatives are separated by `|`, each a
sequence of literals ("text"), character classes ([a-z], [^a-z], .), names of rules and groups, each of which may be
repeated (* + ? {m} {m,} {m,n}). A rule ends with its line, except inside a group, after `::=` and after `|`.
`#` begins a comment. Escapes in literals and classes: \\n \\r \\t \\\\ \\" \\[ \\] \\- \\xHH \\uHHHH \\UHHHHHHHH.

Source: the behaviour of the engine's own parser (llama.cpp, grammars), with which the tests compare this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from lmd.runner.format_error import FormatError

#: The most bytes of a grammar.
MAX_GRAMMAR_BYTES = 64 * 1024
# llguidance reads no more than 32 groups in each other.
_MAX_NESTING = 25
_MAX_RULES = 2_000
_MAX_REPEAT = 1_000_000
# Of repetitions of repetitions, such as `"a"*?`.
_MAX_REPEATED = 4
# What is not settled after so many rounds was made to be slow.
_MAX_ROUNDS = 50
# `.` and [^…] leave out NUL, as they do in llama.cpp.
_FIRST_CHARACTER = 1
_LAST_CHARACTER = 0x10FFFF

_ESCAPES = {"-": "-", "n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of a set: code points as ordered ranges, both ends included, that do not touch."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """A rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """One after the other; nothing when empty."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """Any one of them."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """The same several times; *most* is None for no end, and never 0."""

    node: Node
    least: int
    most: int | None


Node = Chars | Name | Sequence | Choice | Repeat


def parse_gbnf(text: str) -> dict[str, Node]:
    """Return the rules that `root` leads to, in order, without alternatives that can never end.

    Raises:
        FormatError: it does not parse, names a rule that does not exist, or is too large; says the line.
    """
    size_bytes = len(text.encode())
    if size_bytes > MAX_GRAMMAR_BYTES:
        raise FormatError(f"the grammar has {size_bytes:,} bytes, but at most {MAX_GRAMMAR_BYTES:,} are allowed")
    parser = _Parser(text)
    rules = parser.parse()
    if "root" not in rules:
        raise FormatError("the grammar has no rule 'root', which is where it starts")
    for name, offset in parser.uses.items():
        if name not in rules:
            parser.fail(f"the rule '{name}' does not exist", offset)
    return _without_endless(rules)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        # Rules that are used, each with where it is first.
        self.uses: dict[str, int] = {}

    def parse(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        self._skip_space(lines=True)
        while self._at < len(self._text):
            start = self._at
            name = self._read_name()
            if not name:
                self.fail("a rule must begin here, name ::= …")
            if name in rules:
                self.fail(f"the rule '{name}' is defined again", start)
            if len(rules) == _MAX_RULES:
                raise FormatError(f"the grammar has more than {_MAX_RULES:,} rules")
            self._skip_space(lines=False)
            if not self._take("::="):
                self.fail(f"'::=' must follow the name '{name}'")
            self._skip_space(lines=True)
            rules[name] = self._read_choice(depth=0)
            if self._at < len(self._text) and self._peek() not in "\r\n":
                self.fail(f"'{self._peek()}' cannot stand here")
            self._skip_space(lines=True)
        return rules

    def _read_choice(self, depth: int) -> Node:
        options = [self._read_sequence(depth)]
        while self._take("|"):
            self._skip_space(lines=True)
            options.append(self._read_sequence(depth))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _read_sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while True:
            node = self._read_item(depth)
            if node is None:
                break
            self._skip_space(lines=depth > 0)
            count = 0
            while (repeated := self._read_repeat(node)) is not None:
                node = repeated
                count += 1
                if count > _MAX_REPEATED:
                    self.fail("too many repetitions follow each other")
                self._skip_space(lines=depth > 0)
            parts.append(node)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _read_item(self, depth: int) -> Node | None:
        character = self._peek()
        if character == '"':
            return self._read_literal()
        if character == "[":
            return self._read_class()
        if self._take("."):
            return Chars(_tidy([(_FIRST_CHARACTER, _LAST_CHARACTER)]))
        if self._take("("):
            if depth == _MAX_NESTING:
                self.fail(f"groups are nested more than {_MAX_NESTING} deep")
            self._skip_space(lines=True)
            node = self._read_choice(depth + 1)
            if not self._take(")"):
                self.fail("')' is missing")
            return node
        if character in _NAME:
            start = self._at
            name = self._read_name()
            self.uses.setdefault(name, start)
            return Name(name)
        if character and character in "*+?{":
            self.fail(f"there is nothing before '{character}' to repeat")
        if character and character in "<!":
            self.fail("tokens in grammars (<…>) are not supported; write their text")
        return None

    def _read_literal(self) -> Node:
        start = self._at
        self._at += 1
        characters: list[Node] = []
        while not self._take('"'):
            if self._at >= len(self._text):
                self.fail("the literal that begins here has no closing '\"'", start)
            code = self._read_character()
            characters.append(Chars(_tidy([(code, code)])))
        return characters[0] if len(characters) == 1 else Sequence(tuple(characters))

    def _read_class(self) -> Node:
        start = self._at
        self._at += 1
        negated = self._take("^")
        ranges: list[Range] = []
        while not self._take("]"):
            if self._at >= len(self._text):
                self.fail("the character class that begins here has no closing ']'", start)
            first = last = self._read_character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._read_character()
                if last < first:
                    self.fail("the range ends before it begins")
            ranges.append((first, last))
        if negated:
            ranges = list(_complement(_tidy(ranges)))
        ranges = list(_tidy(ranges))
        if not ranges:
            self.fail("the character class has no characters")
        return Chars(tuple(ranges))

    def _read_character(self) -> int:
        character = self._peek()
        self._at += 1
        if character != "\\":
            return ord(character)
        kind = self._peek()
        self._at += 1
        if kind in _HEX_DIGITS:
            digits = self._text[self._at : self._at + _HEX_DIGITS[kind]]
            self._at += len(digits)
            if len(digits) < _HEX_DIGITS[kind] or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                self.fail(f"'\\{kind}' needs {_HEX_DIGITS[kind]} hexadecimal digits")
            code = int(digits, 16)
            if code > _LAST_CHARACTER or 0xD800 <= code <= 0xDFFF:
                self.fail(f"'\\{kind}{digits}' is no character")
            return code
        if kind not in _ESCAPES:
            self.fail(f"'\\{kind}' is no escape; known are \\n \\r \\t \\\\ \\\" \\[ \\] \\- \\x \\u \\U")
        return ord(_ESCAPES[kind])

    def _read_repeat(self, node: Node) -> Node | None:
        if self._take("*"):
            return _repeat(node, 0, None)
        if self._take("+"):
            return _repeat(node, 1, None)
        if self._take("?"):
            return _repeat(node, 0, 1)
        if not self._take("{"):
            return None
        least = self._read_count()
        most: int | None = least
        if self._take(","):
            self._skip_space(lines=False)
            most = None if self._peek() == "}" else self._read_count()
        if not self._take("}"):
            self.fail("'}' is missing")
        if most is not None and most < least:
            self.fail(f"{{{least},{most}}} ends before it begins")
        return _repeat(node, least, most)

    def _read_count(self) -> int:
        self._skip_space(lines=False)
        start = self._at
        while self._peek().isascii() and self._peek().isdigit():
            self._at += 1
        digits = self._text[start : self._at]
        if not digits:
            self.fail("a number must stand here")
        if len(digits) > 7 or int(digits) > _MAX_REPEAT:
            self.fail(f"nothing can be repeated more than {_MAX_REPEAT:,} times")
        self._skip_space(lines=False)
        return int(digits)

    def _read_name(self) -> str:
        start = self._at
        while self._peek() in _NAME:
            self._at += 1
        return self._text[start : self._at]

    def _skip_space(self, *, lines: bool) -> None:
        while character := self._peek():
            if character == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif character in " \t" or (lines and character in "\r\n"):
                self._at += 1
            else:
                return

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, expected: str) -> bool:
        if self._text.startswith(expected, self._at):
            self._at += len(expected)
            return True
        return False

    def fail(self, problem: str, offset: int | None = None) -> NoReturn:
        line = self._text.count("\n", 0, self._at if offset is None else offset) + 1
        raise FormatError(f"line {line} of the grammar: {problem}")


def _repeat(node: Node, least: int, most: int | None) -> Node:
    return Sequence(()) if most == 0 else Repeat(node, least, most)


def _tidy(ranges: list[Range]) -> tuple[Range, ...]:
    """Order and join ranges; leave out surrogates, which are no characters."""
    joined: list[Range] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    parts: list[Range] = []
    for first, last in joined:
        parts.extend(
            (low, high) for low, high in ((first, min(last, 0xD7FF)), (max(first, 0xE000), last)) if low <= high
        )
    return tuple(parts)


def _complement(ranges: tuple[Range, ...]) -> Iterator[Range]:
    start = _FIRST_CHARACTER
    for first, last in ranges:
        if start < first:
            yield start, first - 1
        start = last + 1
    if start <= _LAST_CHARACTER:
        yield start, _LAST_CHARACTER


def _without_endless(rules: dict[str, Node]) -> dict[str, Node]:
    """Drop alternatives that need themselves to end, then rules that `root` does not lead to.

    A model could begin such an alternative and never get out of it.
    """
    order = children_first(rules)
    ended: set[str] = set()
    for _ in range(_MAX_ROUNDS):
        before = len(ended)
        ended.update(name for name in order if name not in ended and _prune(rules[name], ended) is not None)
        if len(ended) == before:
            break
    else:
        raise FormatError("the rules of the grammar are too entangled; use fewer that lead to each other")
    if "root" not in ended:
        raise FormatError("the rule 'root' of the grammar needs itself to end; add an alternative without it")
    kept = {name: node for name in order if (node := _prune(rules[name], ended)) is not None}
    reached = set(children_first(kept))
    return {name: kept[name] for name in rules if name in reached}


def children_first(rules: Mapping[str, Node]) -> list[str]:
    """Return the rules that `root` leads to, each after those it uses where they do not lead back to it."""
    order: list[str] = []
    seen = {"root"}
    path = [("root", names_in(rules["root"]))]
    while path:
        name, names = path[-1]
        following = next((used for used in names if used not in seen), None)
        if following is None:
            order.append(name)
            path.pop()
        else:
            seen.add(following)
            path.append((following, names_in(rules[following])))
    return order


def _prune(node: Node, ended: set[str]) -> Node | None:
    """Return a node without what needs rules outside of *ended*; None when nothing is left."""
    if isinstance(node, Chars):
        return node
    if isinstance(node, Name):
        return node if node.name in ended else None
    if isinstance(node, Sequence):
        parts = [_prune(part, ended) for part in node.parts]
        kept = tuple(part for part in parts if part is not None)
        return Sequence(kept) if len(kept) == len(parts) else None
    if isinstance(node, Choice):
        options = [_prune(option, ended) for option in node.options]
        left = tuple(option for option in options if option is not None)
        return (left[0] if len(left) == 1 else Choice(left)) if left else None
    inner = _prune(node.node, ended)
    if inner is None:
        return None if node.least else Sequence(())
    return Repeat(inner, node.least, node.most)


def names_in(node: Node) -> Iterator[str]:
    """Yield the rules that a node uses."""
    if isinstance(node, Name):
        yield node.name
    elif isinstance(node, Repeat):
        yield from names_in(node.node)
    elif isinstance(node, Sequence | Choice):
        for child in node.parts if isinstance(node, Sequence) else node.options:
            yield from names_in(child)
