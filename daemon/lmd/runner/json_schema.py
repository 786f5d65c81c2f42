"""Reads a JSON Schema, refuses what cannot be honoured with its place, and rewrites it for llguidance.

llguidance knows most of JSON Schema and says which keyword it lacks, but not where it stands, and it accepts some
things quietly. So every subschema that can take part is visited first (`json_schema_check`), and what llguidance would
get wrong or refuse without need is written in another way (`json_schema_rewrite`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from lmd.runner.format_error import FormatError
from lmd.runner.json_schema_check import SchemaVisitor, kind_of
from lmd.runner.json_schema_rewrite import end_recursion, rewrite_one_of

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

#: The most bytes of a schema: the worst schemas of that size take half a second and 100 MB to compile.
MAX_SCHEMA_BYTES = 256 * 1024
# llguidance's reader stops at 128 levels of its own.
_MAX_NESTING = 100

#: How JSON is written. Between its parts there may be one space, or a line break and up to 32 blanks or tabs: enough
#: for pretty printing, and no model can go on with whitespace for ever. `\\u` escapes are left out: every character but
#: the control characters can be written as itself, and llguidance 1.9.1 does not see through such escapes where a
#: name must not match a pattern.
OPTIONS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r" ?|\n[ \t]{0,32}",
    "json_allowed_escapes": 'nrbtf"\\',
    "json_allow_general_unicode_escapes": False,
    "coerce_one_of": False,
    "lenient": False,
}


@dataclass(frozen=True, slots=True)
class PreparedSchema:
    """A schema for llguidance, and its regular expressions, each with words for where it stands."""

    text: str
    patterns: Mapping[str, str]


def prepare_schema(text: str) -> PreparedSchema:
    """Read, check and rewrite a schema.

    Raises:
        FormatError: it is no JSON, no schema, too large, or asks for something that cannot be honoured.
    """
    size_bytes = len(text.encode(errors="surrogatepass"))
    if size_bytes > MAX_SCHEMA_BYTES:
        raise FormatError(f"the schema has {size_bytes:,} bytes, but at most {MAX_SCHEMA_BYTES:,} are allowed")
    root = _parse(text)
    if not isinstance(root, dict | bool):
        raise FormatError(f"the schema must be an object or a boolean, not {kind_of(root)}")
    if root is False:
        raise FormatError("no value can satisfy the schema: it is false")
    if root is True:
        # The same, in the one form that llguidance adds options to.
        root = {}
    visitor = SchemaVisitor(root)
    visitor.visit()
    end_recursion(visitor)
    rewrite_one_of(visitor)
    return PreparedSchema(json.dumps(root), visitor.patterns)


def _parse(text: str) -> Any:
    def refuse_constant(name: str) -> NoReturn:
        raise FormatError(f"the schema is not JSON: {name} is no JSON number")

    def read_float(literal: str) -> float:
        value = float(literal)
        if math.isinf(value):
            raise FormatError(f"the number {literal[:40]} in the schema is too large")
        return value

    too_deep = FormatError(f"the schema is nested more than {_MAX_NESTING} levels deep; use '$ref' to make it flatter")
    try:
        root = json.loads(text, parse_constant=refuse_constant, parse_float=read_float)
    except json.JSONDecodeError as error:
        problem = error.msg[0].lower() + error.msg[1:]
        raise FormatError(f"the schema is not JSON: line {error.lineno}, column {error.colno}: {problem}") from error
    except RecursionError as error:
        raise too_deep from error
    except ValueError as error:
        raise FormatError("a number in the schema has too many digits") from error
    level, depth = [root], 1
    while level := [child for value in level for child in _children(value)]:
        depth += 1
        if depth > _MAX_NESTING:
            raise too_deep
    return root


def _children(value: Any) -> Iterator[Any]:
    """Yield what is inside an object or a list and may itself hold something."""
    if isinstance(value, dict):
        yield from (child for child in value.values() if isinstance(child, dict | list))
    elif isinstance(value, list):
        yield from (child for child in value if isinstance(child, dict | list))
