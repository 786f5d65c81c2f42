"""Runs parsed templates, in bounded steps and bytes. Only the render process does that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from lmd.gotemplate.errors import TemplateFailure, TemplateTooMuch, position
from lmd.gotemplate.functions import BUILTINS
from lmd.gotemplate.nodes import (
    Action,
    Branch,
    Call,
    Chain,
    Command,
    Dot,
    Field,
    Function,
    Jump,
    Literal,
    Node,
    Operand,
    Pipeline,
    Range,
    Template,
    Text,
    Variable,
)
from lmd.gotemplate.printing import shown
from lmd.gotemplate.values import Budget, Misuse, OverBudget, Struct, Value, go_bytes, truth, type_name

MAX_STEPS = 1_000_000
"""What one rendering may take; a chat of a thousand turns takes some 50 000."""

# How deep templates may call each other, with all that is around the calls.
_MAX_CALLS = 40
_NO_VALUE = "<no value>"


class _Break(Exception):
    """Leaves a loop."""


class _Continue(Exception):
    """Goes on with the next element."""


class _Unset:
    """Stands for no value passed on through a pipe."""


_UNSET = _Unset()


def execute(template: Template, variables: Mapping[str, Value], budget: Budget) -> str:
    """Return what a template writes, given what its dot has.

    Raises:
        TemplateFailure: where it fails.
        TemplateTooMuch: where it has used up *budget*.
    """
    return _Run(template, budget).run(dict(variables))


class _Run:
    def __init__(self, template: Template, budget: Budget) -> None:
        self._template = template
        self._budget = budget
        self._parts: list[str] = []
        self._variables: list[tuple[str, Value]] = []
        self._calls = 0
        #: Where the pipeline is that was evaluated last, for what has no place of its own.
        self._place = 0

    def run(self, dot: Value) -> str:
        self._variables = [("$", dot)]
        try:
            self._list(self._template.body, dot)
        except OverBudget as error:
            raise TemplateTooMuch(str(error), *position(self._template.source, self._place)) from None
        return go_bytes("".join(self._parts)).decode("utf-8", "replace")

    # Statements

    def _list(self, nodes: Sequence[Node], dot: Value) -> None:
        known = len(self._variables)
        for node in nodes:
            self._budget.charge()
            if isinstance(node, Text):
                self._write(node.text)
            elif isinstance(node, Action):
                value = self._pipeline(node.pipeline, dot)
                if not node.pipeline.variables:
                    with self._at(node.pipeline.offset):
                        self._write(_NO_VALUE if value is None else shown(value, self._budget))
            elif isinstance(node, Branch):
                self._branch(node, dot)
            elif isinstance(node, Range):
                self._range(node, dot)
            elif isinstance(node, Jump):
                raise _Continue if node.again else _Break
            else:
                self._call(node, dot)
        del self._variables[known:]

    def _write(self, text: str) -> None:
        self._budget.write(len(go_bytes(text)))
        self._parts.append(text)

    def _branch(self, node: Branch, dot: Value) -> None:
        known = len(self._variables)
        value = self._pipeline(node.pipeline, dot)
        if truth(value):
            self._list(node.body, value if node.binds else dot)
        else:
            self._list(node.otherwise, dot)
        del self._variables[known:]

    def _range(self, node: Range, dot: Value) -> None:
        known = len(self._variables)
        value = self._pipeline(node.pipeline, dot, assign=False)
        names = node.pipeline.variables
        empty = True
        start = len(self._variables)
        for key, item in self._elements(value, node.pipeline.offset):
            empty = False
            self._budget.charge()
            taken = (key, item) if len(names) == 2 else (item,)
            for name, part in zip(names, taken, strict=False):
                if node.pipeline.declares:
                    self._variables.append((name, part))
                else:
                    self._set(name, part)
            try:
                self._list(node.body, item)
            except _Continue:
                pass
            except _Break:
                break
            finally:
                del self._variables[start:]
        if empty:
            self._list(node.otherwise, dot)
        del self._variables[known:]

    def _elements(self, value: Value, offset: int) -> Iterator[tuple[Value, Value]]:
        if isinstance(value, list | tuple):
            return enumerate(value)
        if isinstance(value, dict):
            return iter([(key, value[key]) for key in sorted(value, key=go_bytes)])
        if isinstance(value, int) and not isinstance(value, bool):
            return ((number, number) for number in range(value))
        if value is None:
            return iter(())
        self._fail(f"range can't iterate over a {type_name(value)}", offset)

    def _call(self, node: Call, dot: Value) -> None:
        self._calls += 1
        if self._calls > _MAX_CALLS:
            self._fail(f"templates call each other more than {_MAX_CALLS} deep", node.offset)
        inner = None if node.pipeline is None else self._pipeline(node.pipeline, dot)
        variables, self._variables = self._variables, [("$", inner)]
        self._list(self._template.defined[node.name], inner)
        self._variables = variables
        self._calls -= 1

    # Values

    def _pipeline(self, pipeline: Pipeline, dot: Value, *, assign: bool = True) -> Value:
        self._place = pipeline.offset
        value: Value = _UNSET
        for command in pipeline.commands:
            value = self._command(command, dot, value)
        if assign:
            for name in pipeline.variables:
                if pipeline.declares:
                    self._variables.append((name, value))
                else:
                    self._set(name, value)
        return value

    def _set(self, name: str, value: Value) -> None:
        for index in range(len(self._variables) - 1, -1, -1):
            if self._variables[index][0] == name:
                self._variables[index] = (name, value)
                return

    def _command(self, command: Command, dot: Value, passed: Value) -> Value:
        first = command.operands[0]
        if isinstance(first, Function):
            return self._function(first, command.operands[1:], dot, passed)
        if len(command.operands) > 1 or passed is not _UNSET:
            if isinstance(first, Field | Chain) or (isinstance(first, Variable) and first.names):
                self._fail(f"{first.names[-1]} has arguments but cannot be invoked as function", first.offset)
            self._fail("can't give argument to non-function", first.offset)
        if isinstance(first, Literal) and first.value is None:
            self._fail("nil is not a command", first.offset)
        return self._operand(first, dot)

    def _operand(self, node: Operand, dot: Value) -> Value:
        self._budget.charge()
        if isinstance(node, Literal):
            return node.value
        if isinstance(node, Dot):
            return dot
        if isinstance(node, Field):
            return self._fields(dot, node.names, node.offset)
        if isinstance(node, Variable):
            value = next(value for name, value in reversed(self._variables) if name == node.name)
            return self._fields(value, node.names, node.offset)
        if isinstance(node, Chain):
            return self._fields(self._pipeline(node.operand, dot), node.names, node.offset)
        if isinstance(node, Function):
            return self._function(node, (), dot, _UNSET)
        return self._pipeline(node, dot)

    def _fields(self, value: Value, names: tuple[str, ...], offset: int) -> Value:
        for number, name in enumerate(names):
            if isinstance(value, dict):
                value = value.get(name)
            elif isinstance(value, Struct):
                if name not in value.fields:
                    known = ", ".join(value.fields)
                    self._fail(f"can't evaluate field {name} in type {value.type}; it has {known}", offset)
                value = value.fields[name]
            elif value is None:
                if number:
                    self._fail(f"nil pointer evaluating interface {{}}.{name}", offset)
                return None
            else:
                self._fail(f"can't evaluate field {name} in type {type_name(value)}", offset)
        return value

    def _function(self, node: Function, arguments: Sequence[Operand], dot: Value, passed: Value) -> Value:
        if node.name in ("and", "or"):
            return self._logic(node, arguments, dot, passed)
        function = BUILTINS[node.name]
        count = len(arguments) + (passed is not _UNSET)
        if count < function.least or (function.most is not None and count > function.most):
            least = "at least " if function.most is None else ""
            self._fail(f"wrong number of args for {node.name}: want {least}{function.least} got {count}", node.offset)
        values = [self._operand(argument, dot) for argument in arguments]
        if passed is not _UNSET:
            values.append(passed)
        with self._at(node.offset):
            self._budget.charge()
            try:
                return function.run(values, self._budget)
            except Misuse as error:
                self._fail(f"error calling {node.name}: {error}", node.offset)

    def _logic(self, node: Function, arguments: Sequence[Operand], dot: Value, passed: Value) -> Value:
        """Return the first argument that decides, or the last; those after it are not looked at."""
        if not arguments and passed is _UNSET:
            self._fail(f"wrong number of args for {node.name}: want at least 1 got 0", node.offset)
        value: Value = None
        for argument in arguments:
            value = self._operand(argument, dot)
            if truth(value) == (node.name == "or"):
                return value
        return value if passed is _UNSET else passed

    @contextmanager
    def _at(self, offset: int) -> Iterator[None]:
        """Say where the budget was used up."""
        try:
            yield
        except OverBudget as error:
            raise TemplateTooMuch(str(error), *position(self._template.source, offset)) from None

    def _fail(self, message: str, offset: int) -> NoReturn:
        raise TemplateFailure(message, *position(self._template.source, offset))
