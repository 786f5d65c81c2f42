"""Makes a tree of a template."""

from __future__ import annotations

from typing import NoReturn

from lmd.gotemplate.errors import TemplateSyntax, position
from lmd.gotemplate.lexer import Kind, Token, tokens
from lmd.gotemplate.literals import read_literal
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

MAX_CHARACTERS = 256 << 10
"""The longest template; the longest on the Hub have some 30 kB."""

#: How deep blocks and parentheses may stand in each other; the parser and what runs its trees recurse.
MAX_DEPTH = 80

FUNCTIONS = frozenset(
    {
        *("and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge"),
        *("len", "index", "slice", "print", "printf", "println", "html", "urlquery"),
        *("json", "currentDate", "yesterdayDate", "toTypeScriptType"),
    }
)
"""The functions that templates may call: Go's, and Ollama's four."""

_REFUSED = {
    "call": "the function call is not supported: there are no values to call",
    "js": "the function js is not supported: prompts are no scripts",
}
_LITERALS = frozenset({Kind.STRING, Kind.CHARACTER, Kind.NUMBER, Kind.BOOL, Kind.NIL})
_ENDS = frozenset({Kind.CLOSE, Kind.RIGHT})


def parse(source: str) -> Template:
    """Parse a template.

    Raises:
        TemplateSyntax: at its first mistake, or where it is longer or deeper than it may be.
    """
    if len(source) > MAX_CHARACTERS:
        raise TemplateSyntax(f"a template has at most {MAX_CHARACTERS} characters", *position(source, MAX_CHARACTERS))
    return _Parser(source).template()


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = tokens(source)
        self._ahead: list[Token] = []
        self._variables = ["$"]
        self._depth = 0
        self._ranges = 0
        self._defined: dict[str, tuple[Node, ...]] = {}
        self._calls: list[Call] = []

    def template(self) -> Template:
        body, _ = self._list(frozenset())
        for call in self._calls:
            if call.name not in self._defined:
                self._fail(f'template "{call.name}" is not defined', call.offset)
        return Template(self._source, body, self._defined)

    # Tokens

    def _next(self) -> Token:
        return self._ahead.pop() if self._ahead else next(self._tokens)

    def _back(self, token: Token) -> None:
        self._ahead.append(token)

    def _next_word(self) -> Token:
        """Return the next token that is no space."""
        token = self._next()
        while token.kind is Kind.SPACE:
            token = self._next()
        return token

    def _fail(self, message: str, offset: int) -> NoReturn:
        raise TemplateSyntax(message, *position(self._source, offset))

    def _unexpected(self, token: Token, context: str) -> NoReturn:
        self._fail(f"unexpected {token} in {context}", token.offset)

    def _deeper(self, offset: int) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"it nests more than {MAX_DEPTH} deep", offset)

    # Statements

    def _list(self, ends: frozenset[str]) -> tuple[tuple[Node, ...], Token]:
        """Return the nodes up to one of the keywords *ends*, or up to the end of the template when there are none."""
        nodes: list[Node] = []
        while True:
            token = self._next()
            if token.kind is Kind.TEXT:
                nodes.append(Text(token.text))
                continue
            if token.kind is Kind.END:
                if ends:
                    missing = " or ".join(f"{{{{{end}}}}}" for end in sorted(ends))
                    self._fail(f"the template ends where {missing} is missing", token.offset)
                return tuple(nodes), token
            word = self._next_word()
            if word.kind is not Kind.KEYWORD:
                self._back(word)
                nodes.append(Action(self._pipeline("command", Kind.CLOSE)))
            elif word.text in ends:
                return tuple(nodes), word
            elif word.text in ("end", "else"):
                self._fail(f"unexpected {{{{{word.text}}}}}", word.offset)
            elif (node := self._statement(word)) is not None:
                nodes.append(node)

    def _statement(self, word: Token) -> Node | None:
        if word.text in ("break", "continue"):
            self._close(word)
            if not self._ranges:
                self._fail(f"{{{{{word.text}}}}} outside {{{{range}}}}", word.offset)
            return Jump(word.text == "continue", word.offset)
        if word.text == "template":
            return self._call(word)
        if word.text == "define":
            self._define(word)
            return None
        return self._block(word) if word.text == "block" else self._control(word)

    def _close(self, word: Token) -> None:
        token = self._next_word()
        if token.kind is not Kind.CLOSE:
            self._unexpected(token, word.text)

    def _control(self, word: Token) -> Node:
        self._deeper(word.offset)
        known = len(self._variables)
        pipeline = self._pipeline(word.text, Kind.CLOSE)
        self._ranges += word.text == "range"
        body, end = self._list(frozenset({"end", "else"}))
        self._ranges -= word.text == "range"
        otherwise: tuple[Node, ...] = ()
        if end.text == "end":
            self._close(end)
        else:
            otherwise = self._otherwise(word)
        del self._variables[known:]
        self._depth -= 1
        if word.text == "range":
            return Range(pipeline, body, otherwise)
        return Branch(word.text == "with", pipeline, body, otherwise)

    def _otherwise(self, word: Token) -> tuple[Node, ...]:
        token = self._next_word()
        if token.kind is Kind.KEYWORD and token.text == word.text and word.text != "range":
            # `{{else if}}` is an `{{else}}` with an `{{if}}` in it that has the same `{{end}}`.
            return (self._control(token),)
        if token.kind is not Kind.CLOSE:
            self._unexpected(token, "else")
        body, end = self._list(frozenset({"end"}))
        self._close(end)
        return body

    def _call(self, word: Token) -> Call:
        name = self._template_name(word)
        token = self._next_word()
        pipeline = None
        if token.kind is not Kind.CLOSE:
            self._back(token)
            pipeline = self._pipeline("template", Kind.CLOSE)
        call = Call(name, pipeline, word.offset)
        self._calls.append(call)
        return call

    def _define(self, word: Token) -> None:
        if self._depth:
            self._fail("unexpected {{define}}: it stands outside of all blocks", word.offset)
        name = self._template_name(word)
        self._close(word)
        self._defined[name] = self._own_body(word)

    def _block(self, word: Token) -> Call:
        name = self._template_name(word)
        pipeline = self._pipeline("block", Kind.CLOSE)
        self._defined[name] = self._own_body(word)
        return Call(name, pipeline, word.offset)

    def _own_body(self, word: Token) -> tuple[Node, ...]:
        """Parse the body of a template of the template's own, which sees no variables of others."""
        self._deeper(word.offset)
        variables, self._variables = self._variables, ["$"]
        ranges, self._ranges = self._ranges, 0
        body, end = self._list(frozenset({"end"}))
        self._close(end)
        self._variables, self._ranges = variables, ranges
        self._depth -= 1
        return body

    def _template_name(self, word: Token) -> str:
        token = self._next_word()
        if token.kind is not Kind.STRING:
            self._unexpected(token, f"{word.text} clause")
        return str(self._literal(token).value)

    # Pipelines

    def _pipeline(self, context: str, end: Kind) -> Pipeline:
        start = self._next_word()
        self._back(start)
        variables, declares = self._targets(context)
        commands: list[Command] = []
        while True:
            token = self._next_word()
            if token.kind is end:
                break
            if token.kind in (Kind.CLOSE, Kind.KEYWORD, Kind.DECLARE, Kind.ASSIGN, Kind.PIPE, Kind.OTHER, Kind.RIGHT):
                self._unexpected(token, context)
            self._back(token)
            commands.append(self._command())
        if not commands:
            self._fail(f"missing value for {context}", token.offset)
        for number, command in enumerate(commands[1:], 2):
            if isinstance(command.operands[0], Literal | Dot):
                self._fail(f"non executable command in pipeline stage {number}", command.offset)
        # Not before: the value of a variable is made without it.
        if declares:
            self._variables += variables
        return Pipeline(variables, declares, tuple(commands), start.offset)

    def _targets(self, context: str) -> tuple[tuple[str, ...], bool]:
        """Return the variables before `:=` or `=`."""
        taken: list[Token] = []
        names: list[Token] = []
        while True:
            token = self._next_word()
            taken.append(token)
            if token.kind is Kind.VARIABLE:
                after = self._next()
                taken.append(after)
                if after.kind is Kind.SPACE:
                    after = self._next_word()
                    taken.append(after)
                names.append(token)
                if after.kind in (Kind.DECLARE, Kind.ASSIGN):
                    declares = after.kind is Kind.DECLARE
                    if not declares:
                        for name in names:
                            self._known(name)
                    return tuple(name.text for name in names), declares
                if after.text == "," and context == "range" and len(names) < 2:
                    continue
                if after.text == "," and after.kind is Kind.OTHER:
                    self._fail(f"too many declarations in {context}", after.offset)
            self._ahead += reversed(taken)
            return (), False

    def _command(self) -> Command:
        operands: list[Operand] = []
        token = self._next_word()
        start = token.offset
        while True:
            self._back(token)
            operands.append(self._operand())
            token = self._next()
            if token.kind is Kind.SPACE:
                token = self._next_word()
                if token.kind not in _ENDS and token.kind is not Kind.PIPE:
                    continue
            if token.kind in _ENDS:
                self._back(token)
                break
            if token.kind is Kind.PIPE:
                # With nothing behind it a pipe changes nothing, which Go accepts.
                break
            self._unexpected(token, "operand")
        return Command(tuple(operands), start)

    def _operand(self) -> Operand:
        token = self._next()
        node = self._term(token)
        names: list[str] = []
        after = self._next()
        while after.kind is Kind.FIELD:
            names.append(after.text[1:])
            after = self._next()
        self._back(after)
        if not names:
            return node
        if isinstance(node, Field):
            return Field((*node.names, *names), node.offset)
        if isinstance(node, Variable):
            return Variable(node.name, (*node.names, *names), node.offset)
        if isinstance(node, Pipeline):
            return Chain(node, tuple(names), token.offset)
        if isinstance(node, Function):
            # A function without arguments, whose result has the field.
            call = Pipeline((), False, (Command((node,), token.offset),), token.offset)
            return Chain(call, tuple(names), token.offset)
        self._fail(f"unexpected . after {token}", token.offset)

    def _term(self, token: Token) -> Operand:
        if token.kind is Kind.NAME:
            if token.text not in FUNCTIONS:
                self._fail(_REFUSED.get(token.text) or f'function "{token.text}" not defined', token.offset)
            return Function(token.text, token.offset)
        if token.kind is Kind.DOT:
            return Dot(token.offset)
        if token.kind is Kind.FIELD:
            return Field((token.text[1:],), token.offset)
        if token.kind is Kind.VARIABLE:
            self._known(token)
            return Variable(token.text, (), token.offset)
        if token.kind is Kind.LEFT:
            self._deeper(token.offset)
            pipeline = self._pipeline("parenthesized pipeline", Kind.RIGHT)
            self._depth -= 1
            return pipeline
        if token.kind in _LITERALS:
            return self._literal(token)
        self._unexpected(token, "operand")

    def _known(self, token: Token) -> None:
        if token.text not in self._variables:
            self._fail(f'undefined variable "{token.text}"', token.offset)

    def _literal(self, token: Token) -> Literal:
        try:
            return Literal(read_literal(token.text), token.offset)
        except ValueError as error:
            self._fail(str(error), token.offset)
