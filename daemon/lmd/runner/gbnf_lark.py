"""Writes a GBNF grammar in llguidance's dialect of Lark, so that it means the same.

GBNF describes characters; llguidance reads lexemes first, each as long as it can be, and parses those. Written lexeme
by lexeme a grammar would lose texts: in `name "b"`, where a name is `[a-z]+`, the name takes every b (llguidance's own
converter, `gbnf_to_lark`, has this fault). Written character by character it would be exact and slow: milliseconds a
token inside a JSON string, where a lexeme takes 50 microseconds.

So the largest parts without recursion become lexemes, and those for which "as long as it can be" might be wrong are
taken apart again, down to single characters if need be. It cannot be wrong for a lexeme when no character that may
follow it in the grammar could also carry on, after the same text, the lexeme itself or another one. This is decided
on the safe side: any two lexemes count as possible at the same place, and counted repetitions as open ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lmd.runner.gbnf import Chars, Choice, Name, Node, Repeat, Sequence, children_first
from lmd.runner.gbnf_lexeme import Alphabet, Budget, Lexeme, LexemeMaker, TooMuchWork, carries_on

# What is larger or nested deeper stays grammar.
_MAX_LEXEME_SIZE = 300
_MAX_LEXEME_HEIGHT = 100
# Steps of comparing lexemes, a few microseconds each.
_MAX_WORK = 200_000


def to_lark(rules: Mapping[str, Node], *, characters_only: bool = False) -> str:
    """Return the text for llguidance of the rules that `parse_gbnf` returned.

    *characters_only* makes each character a lexeme: that is what the grammar means, and what lexemes must not change.
    """
    writer = _Writer(rules)
    try:
        if not characters_only:
            writer.settle()
            return writer.write()
    except TooMuchWork:
        pass
    writer.use_characters_only()
    return writer.write()


@dataclass(frozen=True, slots=True)
class _Token:
    """A lexeme."""

    regex: str


@dataclass(frozen=True, slots=True)
class _All:
    """One after the other."""

    parts: tuple[_Plan, ...]


@dataclass(frozen=True, slots=True)
class _Any:
    """One of them."""

    options: tuple[_Plan, ...]


@dataclass(frozen=True, slots=True)
class _Times:
    """The same several times."""

    part: _Plan
    least: int
    most: int | None


# How a rule is written: which parts of it are lexemes.
_Plan = _Token | Name | _All | _Any | _Times


class _Writer:
    def __init__(self, rules: Mapping[str, Node]) -> None:
        self._rules = rules
        self._order = children_first(rules)
        self._nullable = self._find_nullable()
        self._measures: dict[str, tuple[int, int] | None] = {}
        for name in self._order:
            self._measures[name] = self._measure(rules[name])
        self._alphabet = Alphabet(rules.values())
        self._maker = LexemeMaker(rules, self._alphabet)
        self._lexemes: dict[str, Lexeme] = {}
        self._plans: dict[str, _Plan] = {}
        self._broken: set[str] = set()
        self._characters_only = False

    def settle(self) -> None:
        """Find lexemes that are safe.

        Raises:
            TooMuchWork: the grammar is too large for that.
        """
        budget = Budget(_MAX_WORK)
        while True:
            self._plan_rules()
            conflicts = self._find_conflicts(budget)
            if not conflicts:
                return
            self._broken |= conflicts

    def use_characters_only(self) -> None:
        """Make every character a lexeme."""
        self._characters_only = True
        self._plan_rules()

    def write(self) -> str:
        """Return the grammar."""
        names = {name: f"r{number}" for number, name in enumerate(self._plans)}
        tokens = {regex: f"T{number}" for number, regex in enumerate(self._lexemes)}

        def text(plan: _Plan) -> str:
            if isinstance(plan, _Token):
                return tokens[plan.regex]
            if isinstance(plan, Name):
                return names[plan.name]
            if isinstance(plan, _All):
                return " ".join(text(part) for part in plan.parts) or '""'
            if isinstance(plan, _Any):
                return f"({' | '.join(text(option) for option in plan.options)})"
            most = "" if plan.most is None else plan.most
            part = text(plan.part) if isinstance(plan.part, _Any | _Token | Name) else f"({text(plan.part)})"
            return f"{part}{{{plan.least},{most}}}"

        lines = ["%llguidance {}", f"start: {names['root']}"]
        lines += [f"{names[name]}: {text(plan)}" for name, plan in self._plans.items()]
        lines += [f"{token}: /{regex}/" for regex, token in tokens.items()]
        return "\n".join(lines) + "\n"

    def _find_nullable(self) -> set[str]:
        """Return the rules that match the empty text."""
        nullable: set[str] = set()
        before = -1
        while before < len(nullable):
            before = len(nullable)
            nullable.update(name for name in self._order if _is_nullable(self._rules[name], nullable))
        return nullable

    def _measure(self, node: Node) -> tuple[int, int] | None:
        """Return how many characters a node has with its rules written out, and how deep it is; None for recursion."""
        if isinstance(node, Chars):
            return 1, 1
        if isinstance(node, Name):
            inner = [self._measures.get(node.name)]
        elif isinstance(node, Repeat):
            inner = [self._measure(node.node)]
        else:
            inner = [self._measure(child) for child in (node.parts if isinstance(node, Sequence) else node.options)]
        known = [measure for measure in inner if measure is not None]
        size, height = sum(size for size, _ in known), 1 + max((height for _, height in known), default=0)
        if len(known) < len(inner) or size > _MAX_LEXEME_SIZE or height > _MAX_LEXEME_HEIGHT:
            return None
        return size, height

    def _plan_rules(self) -> None:
        self._plans = {}
        used: dict[str, Lexeme] = {}
        todo = ["root"]
        while todo:
            name = todo.pop()
            if name in self._plans:
                continue
            plan = self._plans[name] = self._plan(self._rules[name])
            for leaf in _leaves(plan):
                if isinstance(leaf, Name):
                    todo.append(leaf.name)
                else:
                    used[leaf.regex] = self._lexemes[leaf.regex]
        self._lexemes = used

    def _plan(self, node: Node) -> _Plan:
        token = self._token(node)
        if token is not None:
            return token
        if isinstance(node, Name):
            return node
        if isinstance(node, Sequence):
            return self._plan_sequence(node)
        if isinstance(node, Choice):
            return self._plan_choice(node)
        assert isinstance(node, Repeat)
        if node.least == 0:
            token = self._token(Repeat(node.node, 1, node.most))
            if token is not None:
                return _Times(token, 0, 1)
        return _Times(self._plan(node.node), node.least, node.most)

    def _plan_sequence(self, node: Sequence) -> _Plan:
        """Make lexemes of neighbours."""
        parts: list[_Plan] = []
        run: list[Node] = []
        size = 0

        def end_run() -> None:
            token = self._token(Sequence(tuple(run))) if len(run) > 1 else None
            parts.extend([token] if token is not None else [self._plan(part) for part in run])
            run.clear()

        for part in node.parts:
            # A rule is kept for itself: it is mostly what its author takes for one thing.
            measure = None if isinstance(part, Name) else self._measure(part)
            if measure is None or size + measure[0] > _MAX_LEXEME_SIZE:
                end_run()
                size = 0
            if measure is None:
                parts.append(self._plan(part))
            else:
                run.append(part)
                size += measure[0]
        end_run()
        return _All(tuple(parts))

    def _plan_choice(self, node: Choice) -> _Plan:
        """Make one lexeme of all options that can be one."""
        simple: list[Node] = []
        others: list[Node] = []
        for option in node.options:
            (others if self._token(option, keep=False) is None else simple).append(option)
        token = self._token(Choice(tuple(simple))) if others and len(simple) > 1 else None
        if token is None:
            return _Any(tuple(self._plan(option) for option in node.options))
        return _Any((token, *(self._plan(option) for option in others)))

    def _token(self, node: Node, *, keep: bool = True) -> _Token | None:
        """Return a node as a lexeme, or None when it cannot be one."""
        if not isinstance(node, Chars):
            if self._characters_only or self._measure(node) is None or _is_nullable(node, self._nullable):
                return None
        regex = self._maker.regex(node)
        if regex in self._broken:
            return None
        if keep and regex not in self._lexemes:
            self._lexemes[regex] = self._maker.make(node)
        return _Token(regex)

    def _find_conflicts(self, budget: Budget) -> set[str]:
        """Return the lexemes that carry others on: to be taken apart."""
        conflicts: set[str] = set()
        following = self._find_following(budget)
        for regex, lexeme in self._lexemes.items():
            for other_regex, other in self._lexemes.items():
                if carries_on(lexeme, other, following[regex], self._alphabet, budget):
                    conflicts.add(other_regex)
        return conflicts

    def _find_following(self, budget: Budget) -> dict[str, int]:
        """Return the characters that may follow each lexeme."""
        first: dict[str, int] = dict.fromkeys(self._plans, 0)
        after: dict[str, int] = dict.fromkeys(self._plans, 0)
        following: dict[str, int] = dict.fromkeys(self._lexemes, 0)

        changed = True

        def note(masks: dict[str, int], key: str, mask: int) -> None:
            nonlocal changed
            if mask & ~masks[key]:
                masks[key] |= mask
                changed = True

        def visit(plan: _Plan, next_mask: int) -> int:
            """Note what follows inside a plan that *next_mask* follows; return what the two may begin with."""
            budget.spend(1)
            if isinstance(plan, _Token):
                note(following, plan.regex, next_mask)
                return self._lexemes[plan.regex].first_mask
            if isinstance(plan, Name):
                note(after, plan.name, next_mask)
                return first[plan.name] | (next_mask if plan.name in self._nullable else 0)
            if isinstance(plan, _All):
                for part in reversed(plan.parts):
                    next_mask = visit(part, next_mask)
                return next_mask
            if isinstance(plan, _Any):
                mask = 0
                for option in plan.options:
                    mask |= visit(option, next_mask)
                return mask
            mask = visit(plan.part, next_mask)
            if plan.most != 1:
                mask |= visit(plan.part, next_mask | mask)
            return mask | next_mask if plan.least == 0 else mask

        while changed:
            changed = False
            for name, plan in self._plans.items():
                note(first, name, visit(plan, 0))
                visit(plan, after[name])
        return following


def _is_nullable(node: Node, nullable: set[str]) -> bool:
    """Tell whether a node matches the empty text, given the rules that do."""
    if isinstance(node, Chars):
        return False
    if isinstance(node, Name):
        return node.name in nullable
    if isinstance(node, Sequence):
        return all(_is_nullable(part, nullable) for part in node.parts)
    if isinstance(node, Choice):
        return any(_is_nullable(option, nullable) for option in node.options)
    return node.least == 0 or _is_nullable(node.node, nullable)


def _leaves(plan: _Plan) -> Iterator[_Token | Name]:
    if isinstance(plan, _Token | Name):
        yield plan
    elif isinstance(plan, _Times):
        yield from _leaves(plan.part)
    else:
        for part in plan.parts if isinstance(plan, _All) else plan.options:
            yield from _leaves(part)
