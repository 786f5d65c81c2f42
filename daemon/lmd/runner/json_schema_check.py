"""Visits the subschemas that take part in a JSON Schema and checks their keywords.

What is checked: keywords that llguidance lacks, values of the wrong kind, references that lead nowhere; and two inputs
that llguidance 1.9.1 gets wrong quietly (random schemas checked with the jsonschema package showed them): constants
with control characters, and an exclusive bound that is a whole number less than one away from the other bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, TypeGuard
from urllib.parse import unquote

from lmd.runner.format_error import FormatError

# Text that the schema alone decides is worked on anew for every token: 1.8 ms a token for 32 KiB.
_MAX_CONSTANT_CHARACTERS = 32 * 1024
# Each is compared with each: 0.6 ms a pair.
_MAX_NAME_PATTERNS = 64
# References between alternatives cost the most: 2 s for 45 that all lead to each other.
_MAX_REFERENCES = 2_000
# Beyond that llguidance's repeat counts end.
_MAX_COUNT = 1_000_000_000
# Its automaton has about as many states, the decimal point left out.
_MAX_MULTIPLE_OF = 100_000

_DRAFTS = (
    "json-schema.org/draft-04/schema",
    "json-schema.org/draft-06/schema",
    "json-schema.org/draft-07/schema",
    "json-schema.org/draft/2019-09/schema",
    "json-schema.org/draft/2020-12/schema",
)
_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid")
_SCHEMAS = ("additionalItems", "additionalProperties", "items")
_LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS_OF_SCHEMAS = ("$defs", "definitions", "patternProperties", "properties")
_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
_BOUNDS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum")

Schema = dict[str, Any]

# Unsupported keywords, each with a test for values that ask for nothing.
_UNSUPPORTED: Mapping[str, Callable[[Any, Schema], bool]] = {
    "$dynamicRef": lambda value, schema: False,
    "$recursiveRef": lambda value, schema: False,
    "contains": lambda value, schema: schema.get("minContains") == 0 and "maxContains" not in schema,
    "dependencies": lambda value, schema: not value,
    "dependentRequired": lambda value, schema: not value,
    "dependentSchemas": lambda value, schema: not value,
    "else": lambda value, schema: "if" not in schema,
    "if": lambda value, schema: "then" not in schema and "else" not in schema,
    "maxContains": lambda value, schema: "contains" not in schema,
    "minContains": lambda value, schema: "contains" not in schema,
    "not": lambda value, schema: value is False,
    "propertyNames": lambda value, schema: value in (True, {}, {"type": "string"}),
    "then": lambda value, schema: "if" not in schema,
    "unevaluatedItems": lambda value, schema: value in (True, {}),
    "unevaluatedProperties": lambda value, schema: value in (True, {}),
    "uniqueItems": lambda value, schema: value is False,
}
_INSTEAD = {
    "not": "say what is allowed instead",
    "uniqueItems": "leave it out and look for repeated items afterwards",
}


class SchemaVisitor:
    """Checks every subschema that the root leads to.

    Attributes:
        schemas: those subschemas by place, a JSON pointer.
        uses: the places that each place leads to.
        references: where each `$ref` leads, by the place it stands at.
        patterns: regular expressions, each with words for where it stands.
    """

    def __init__(self, root: Schema | bool) -> None:
        self.root = root
        self.schemas: dict[str, Schema | bool] = {}
        self.uses: dict[str, list[str]] = {}
        self.references: dict[str, str] = {}
        self.patterns: dict[str, str] = {}
        self._todo: list[tuple[str, Any]] = [("#", root)]
        self._exclusive: list[tuple[str, str, float]] = []
        self._bounds: list[float] = []
        self._constant_characters = 0
        self._name_patterns = 0

    def visit(self) -> None:
        """Visit all.

        Raises:
            FormatError: something cannot be honoured.
        """
        while self._todo:
            place, schema = self._todo.pop()
            if place in self.schemas:
                continue
            if not isinstance(schema, dict | bool):
                raise FormatError(f"the schema at {place} must be an object or a boolean, not {kind_of(schema)}")
            self.schemas[place] = schema
            if isinstance(schema, dict):
                self._check(place, schema)
        self._check_bounds()

    def resolve(self, place: str, reference: Any) -> tuple[str, Any]:
        """Return the place and the schema that a `$ref` leads to."""
        _require(isinstance(reference, str), place, "$ref", "a string", reference)
        if reference != "#" and not reference.startswith("#/"):
            raise FormatError(
                f"'$ref' at {place} leads to '{_short(reference)}'; only places in the same schema, such as "
                "'#/$defs/name', are supported"
            )
        target: Any = self.root
        steps = [unquote(step).replace("~1", "/").replace("~0", "~") for step in reference.split("/")[1:]]
        for step in steps:
            if isinstance(target, dict) and step in target:
                target = target[step]
            elif isinstance(target, list) and step.isascii() and step.isdigit() and int(step) < len(target):
                target = target[int(step)]
            else:
                raise FormatError(f"'$ref' at {place} leads to '{_short(reference)}', which does not exist")
        return pointer("#", *steps), target

    def _check(self, place: str, schema: Schema) -> None:
        _drop_unsupported(place, schema)
        _check_identity(place, schema)
        _check_values(place, schema)
        self._note_constants(place, schema)
        self._note_patterns(place, schema)
        self._note_bounds(place, schema)
        subschemas: list[tuple[str, Any]] = []
        if "$ref" in schema:
            target_place, target = self.resolve(place, schema["$ref"])
            self.references[place] = target_place
            if len(self.references) > _MAX_REFERENCES:
                raise FormatError(f"the schema has more than {_MAX_REFERENCES:,} references; use fewer")
            subschemas.append((target_place, target))
        for keyword in _SCHEMAS:
            if isinstance(schema.get(keyword), list):
                subschemas += _below(pointer(place, keyword), enumerate(schema[keyword]))
            elif keyword in schema:
                subschemas.append((pointer(place, keyword), schema[keyword]))
        for keyword in _LISTS_OF_SCHEMAS:
            subschemas += _below(pointer(place, keyword), enumerate(schema.get(keyword, ())))
        for keyword in ("patternProperties", "properties"):
            subschemas += _below(pointer(place, keyword), schema.get(keyword, {}).items())
        self.uses[place] = [used for used, _ in subschemas]
        self._todo += subschemas

    def _note_constants(self, place: str, schema: Schema) -> None:
        for keyword in ("const", "enum"):
            if keyword not in schema:
                continue
            values = schema["enum"] if keyword == "enum" else [schema["const"]]
            characters = 0
            for text in _strings(values):
                characters += len(text)
                control = next((ord(character) for character in text if _is_unwritable(character)), None)
                if control is not None:
                    raise FormatError(
                        f"'{keyword}' at {place} has the control character U+{control:04X}, which is not supported"
                    )
            if len(values) == 1:
                self._constant_characters += characters
        if self._constant_characters > _MAX_CONSTANT_CHARACTERS:
            raise FormatError(
                f"the constants in the schema have more than {_MAX_CONSTANT_CHARACTERS:,} characters together; "
                "leave long ones out and add them to the answer afterwards"
            )

    def _note_patterns(self, place: str, schema: Schema) -> None:
        if "pattern" in schema:
            self.patterns.setdefault(schema["pattern"], f"'pattern' at {place}")
        self._name_patterns += len(schema.get("patternProperties", ()))
        if self._name_patterns > _MAX_NAME_PATTERNS:
            raise FormatError(
                f"the schema has more than {_MAX_NAME_PATTERNS} patterns in 'patternProperties'; join some of them"
            )
        for pattern in schema.get("patternProperties", ()):
            self.patterns.setdefault(pattern, f"the name '{_short(pattern)}' in 'patternProperties' at {place}")
        for pattern in [schema.get("pattern", ""), *schema.get("patternProperties", ())]:
            if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
                raise FormatError(f"{self.patterns[pattern]} is no usable regular expression: it ends with a backslash")

    def _note_bounds(self, place: str, schema: Schema) -> None:
        if schema.get("type") == "integer":
            return
        for end in ("Minimum", "Maximum"):
            inclusive, exclusive = schema.get(end.lower()), schema.get(f"exclusive{end}")
            if exclusive is True:
                exclusive = inclusive
            for bound in (inclusive, exclusive):
                if _is_number(bound):
                    self._bounds.append(bound)
            if _is_number(exclusive) and exclusive == int(exclusive):
                self._exclusive.append((place, f"exclusive{end}", exclusive))

    def _check_bounds(self) -> None:
        # All bounds with all others: 'allOf' and '$ref' can bring together what stands far apart.
        for place, keyword, bound in self._exclusive:
            step = 1 if keyword == "exclusiveMinimum" else -1
            if any(0 < (other - bound) * step < 1 for other in self._bounds):
                raise FormatError(
                    f"'{keyword}' at {place} is less than 1 away from another bound, which is not supported; "
                    f"use '{keyword.removeprefix('exclusive').lower()}'"
                )


def _below(place: str, schemas: Iterable[tuple[object, Any]]) -> Iterator[tuple[str, Any]]:
    return ((pointer(place, key), schema) for key, schema in schemas)


def _drop_unsupported(place: str, schema: Schema) -> None:
    """Refuse keywords that llguidance lacks; drop those that ask for nothing."""
    present = [keyword for keyword in _UNSUPPORTED if keyword in schema]
    for keyword in present:
        if not _UNSUPPORTED[keyword](schema[keyword], schema):
            instead = _INSTEAD.get(keyword, "leave it out, or say the same with other keywords")
            raise FormatError(f"the keyword '{keyword}' at {place} is not supported; {instead}")
    for keyword in (*present, "x-guidance"):
        schema.pop(keyword, None)


def _check_identity(place: str, schema: Schema) -> None:
    """Check the keywords that say which schema this is."""
    if "$schema" in schema:
        _require(isinstance(schema["$schema"], str), place, "$schema", "a string", schema["$schema"])
        draft = schema["$schema"].removeprefix("http://").removeprefix("https://").rstrip("#")
        if draft not in _DRAFTS:
            raise FormatError(
                f"'$schema' at {place} is '{_short(schema['$schema'])}', which is unknown; "
                "the drafts 4, 6, 7, 2019-09 and 2020-12 are supported"
            )
    for keyword in ("$id", "id"):
        # A base for references, which can only be local ones here. In data, "id" is a name like others.
        if isinstance(schema.get(keyword), str) and (keyword == "$id" or place == "#"):
            if place != "#":
                raise FormatError(f"'$id' at {place} is not supported; only the whole schema can have one")
            del schema[keyword]


def _check_values(place: str, schema: Schema) -> None:
    """Check that the values of keywords are of the right kind."""
    for keyword, value in schema.items():
        if keyword in _MAPS_OF_SCHEMAS:
            _require(isinstance(value, dict), place, keyword, "an object", value)
        elif keyword in _LISTS_OF_SCHEMAS:
            _require(isinstance(value, list), place, keyword, "a list", value)
        elif keyword in _COUNTS:
            whole = _is_number(value) and value >= 0 and value == int(value)
            _require(whole, place, keyword, "a whole number, 0 or more", value)
            if value > _MAX_COUNT:
                raise FormatError(f"'{keyword}' at {place} is more than {_MAX_COUNT:,}, which is not supported")
            schema[keyword] = int(value)
        elif keyword == "multipleOf":
            _require(_is_number(value) and value > 0, place, keyword, "a number above 0", value)
            exact = Decimal(str(value)).normalize()
            if exact.scaleb(max(0, -int(exact.as_tuple().exponent))) > _MAX_MULTIPLE_OF:
                raise FormatError(f"'multipleOf' at {place} has too many digits; use a rounder number")
        elif keyword in _BOUNDS:
            _require(_is_number(value) or isinstance(value, bool), place, keyword, "a number", value)
        elif keyword == "pattern":
            _require(isinstance(value, str), place, keyword, "a string", value)
        elif keyword == "required":
            names = isinstance(value, list) and all(isinstance(name, str) for name in value)
            _require(names, place, keyword, "a list of names", value)
        elif keyword == "enum":
            _require(isinstance(value, list) and len(value) > 0, place, keyword, "a list of at least one value", value)
        elif keyword == "type":
            _check_type(place, value)
    _check_format(place, schema)


def _check_type(place: str, value: Any) -> None:
    types = value if isinstance(value, list) else [value]
    known = bool(types) and all(isinstance(name, str) and name in _TYPES for name in types)
    if not known:
        raise FormatError(
            f"'type' at {place} must be one of {', '.join(_TYPES)}, or a list of them, not {_show(value)}"
        )


def _check_format(place: str, schema: Schema) -> None:
    if "format" not in schema:
        return
    types = schema.get("type", "string")
    if "string" not in (types if isinstance(types, list) else [types]):
        # "int32" and the like are notes about numbers; 'format' asserts something only about strings.
        del schema["format"]
    elif schema["format"] not in _FORMATS:
        raise FormatError(
            f"'format' at {place} is {_show(schema['format'])}, which is not supported; known are "
            f"{', '.join(name for name in _FORMATS if name != 'unknown')}; 'pattern' can describe others"
        )


def pointer(place: str, *steps: object) -> str:
    """Return the JSON pointer that leads from *place* on over *steps*."""
    return "/".join([place, *(str(step).replace("~", "~0").replace("/", "~1") for step in steps)])


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    if value is None:
        return "null"
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "a boolean"),
        (str, "a string"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
    )
    return next((word for kind, word in kinds if isinstance(value, kind)), "an object")


def _require(holds: bool, place: str, keyword: str, expected: str, value: Any) -> None:
    if not holds:
        raise FormatError(f"'{keyword}' at {place} must be {expected}, not {_show(value)}")


def _show(value: Any) -> str:
    """Return a value as it can stand in a sentence: short ones as they are, others by their kind."""
    if isinstance(value, str):
        return f"'{_short(value)}'"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)[:40]
    return kind_of(value) if value != [] else "an empty list"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_unwritable(character: str) -> bool:
    """Tell whether JSON could write a character only as a `\\u` escape."""
    return (
        (character < " " and character not in "\b\f\n\r\t") or character == "\x7f" or "\ud800" <= character <= "\udfff"
    )


def _strings(value: Any) -> Iterable[str]:
    """Yield all strings in a JSON value, names included. The value is not nested deeper than Python's stack."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, child in value.items():
            yield name
            yield from _strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child)
