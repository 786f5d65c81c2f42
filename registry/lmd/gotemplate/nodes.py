"""What a parsed template consists of. *offset* is where in the template a node begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant: text, number, true, false or nil."""

    value: str | int | float | bool | None
    offset: int


@dataclass(frozen=True, slots=True)
class Dot:
    """What the template works on here: `.`."""

    offset: int


@dataclass(frozen=True, slots=True)
class Field:
    """Fields of the dot: `.Function.Name`."""

    names: tuple[str, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable and fields of it: `$`, `$x`, `$x.Name`."""

    name: str
    names: tuple[str, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Fields of what a pipeline in parentheses returns: `(index .Messages 0).Role`."""

    operand: Pipeline
    names: tuple[str, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Function:
    """The name of a function."""

    name: str
    offset: int


@dataclass(frozen=True, slots=True)
class Command:
    """An operand, or a function with its arguments."""

    operands: tuple[Operand, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Commands, each of which passes its result on, and the variables that get the last one.

    *declares*: the variables are new ones (`:=`).
    """

    variables: tuple[str, ...]
    declares: bool
    commands: tuple[Command, ...]
    offset: int


Operand = Literal | Dot | Field | Variable | Chain | Function | Pipeline


@dataclass(frozen=True, slots=True)
class Text:
    """What is written as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class Action:
    """A pipeline whose value is written, unless it is kept in variables."""

    pipeline: Pipeline


@dataclass(frozen=True, slots=True)
class Branch:
    """`if` and `with`: *body* when the value is true, else *otherwise*. *binds*: the value is the dot in *body*."""

    binds: bool
    pipeline: Pipeline
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """`range`: *body* for each element, *otherwise* when there is none."""

    pipeline: Pipeline
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Jump:
    """`break`, or `continue` when *again*."""

    again: bool
    offset: int


@dataclass(frozen=True, slots=True)
class Call:
    """`template`: another one of the template's own, by name, with a dot of its own."""

    name: str
    pipeline: Pipeline | None
    offset: int


Node = Text | Action | Branch | Range | Jump | Call


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: what it writes, and the templates that it defines for itself."""

    source: str
    body: tuple[Node, ...]
    defined: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
