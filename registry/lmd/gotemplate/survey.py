"""Says what a template is, and what it uses, without running it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

from lmd.gotemplate.errors import TemplateSyntax
from lmd.gotemplate.nodes import Action, Branch, Call, Chain, Field, Node, Operand, Pipeline, Range, Template, Variable
from lmd.gotemplate.parser import parse

# Statements and comments of Jinja; as text of a Go template they would be strange.
_JINJA = re.compile(r"\{%[-+]?\s*\w|\{#")
# What can begin an action of Go and no expression of Jinja: fields, variables, keywords, comments, and functions with
# arguments behind them.
_GO = re.compile(
    r"\{\{(?:-\s)?\s*(?:\.(?:[A-Za-z_]|\s*-?\}\})|\$|/\*|(?:if|range|with|template|define|block)\s+[.$(\"`a-z]"
    r"|(?:end|else|break|continue)\s*(?:-?\}\}|if\s|with\s)"
    r"|(?:and|or|not|eq|ne|lt|le|gt|ge|len|index|slice|print|printf|println|json|toTypeScriptType)\s+[.$\"`])"
)


def is_go_template(text: str) -> bool:
    """Tell whether *text* is a Go template, rather than Jinja or text without either."""
    return _GO.search(text) is not None and _JINJA.search(text) is None


@functools.lru_cache(maxsize=16)
def identifiers(source: str) -> frozenset[str]:
    """Return the names of all fields that a template reads; none when it does not compile."""
    try:
        template = parse(source)
    except TemplateSyntax:
        return frozenset()
    return frozenset(used_names(template))


def writes_suffix(source: str) -> bool:
    """Tell whether a template writes what comes after a gap, so that a model can fill it."""
    return is_go_template(source) and "Suffix" in identifiers(source)


def used_names(template: Template) -> Iterator[str]:
    """Yield the names of the fields that a template reads, some more than once."""
    yield from _of_nodes(template.body)
    for body in template.defined.values():
        yield from _of_nodes(body)


def _of_nodes(nodes: Sequence[Node]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, Action | Branch | Range | Call) and node.pipeline is not None:
            yield from pipeline_names(node.pipeline)
        if isinstance(node, Branch | Range):
            yield from _of_nodes(node.body)
            yield from _of_nodes(node.otherwise)


def pipeline_names(pipeline: Pipeline) -> Iterator[str]:
    """Yield the names of the fields that a pipeline reads."""
    for command in pipeline.commands:
        for operand in command.operands:
            yield from _of_operand(operand)


def _of_operand(operand: Operand) -> Iterator[str]:
    if isinstance(operand, Field | Variable | Chain):
        yield from operand.names
    if isinstance(operand, Chain):
        yield from pipeline_names(operand.operand)
    elif isinstance(operand, Pipeline):
        yield from pipeline_names(operand)
