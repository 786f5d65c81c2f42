"""Writes parts of a checked JSON Schema in another way, so that llguidance can honour them.

Two things: `oneOf` whose alternatives exclude each other means the same as `anyOf`, which has no restrictions; and
what recurses without end becomes a schema without values, since llguidance would let a model begin a value that it
can never end.
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

from lmd.runner.format_error import FormatError
from lmd.runner.json_schema_check import Schema, SchemaVisitor, pointer

# What is not settled after so many rounds was made to be slow.
_MAX_ROUNDS = 50
_SCALARS = {"boolean", "integer", "null", "number", "string"}


def rewrite_one_of(visitor: SchemaVisitor) -> None:
    """Turn each `oneOf` into `anyOf` when no value fits two of its alternatives.

    The visitor's places are those from before, so this comes last.
    """
    if any("/oneOf/" in place for place in visitor.references.values()):
        # A reference leads to where the alternative would no longer be.
        return
    exclusive: list[Schema] = []
    for place, schema in visitor.schemas.items():
        if isinstance(schema, dict) and "oneOf" in schema:
            alternatives = [_Values(visitor, pointer(place, "oneOf", index)) for index in range(len(schema["oneOf"]))]
            if all(one.excludes(other) for one, other in combinations(alternatives, 2)):
                exclusive.append(schema)
    for schema in exclusive:
        alternatives = schema.pop("oneOf")
        if "anyOf" in schema:
            schema["allOf"] = [*schema.get("allOf", ()), {"anyOf": alternatives}]
        else:
            schema["anyOf"] = alternatives


class _Values:
    """What can be seen at once of the values a schema has."""

    def __init__(self, visitor: SchemaVisitor, place: str) -> None:
        seen: set[str] = set()
        while place in visitor.references and place not in seen:
            seen.add(place)
            place = visitor.references[place]
        found = visitor.schemas[place]
        schema: Schema = found if isinstance(found, dict) else {}
        types = schema.get("type", [])
        # An integer is a number, too.
        self._types = {
            "number" if name == "integer" else name for name in ([types] if isinstance(types, str) else types)
        }
        self._constants = _constants(schema)
        self._properties: dict[str, set[str]] = {}
        for name in schema.get("required", ()):
            inner = visitor.schemas.get(pointer(place, "properties", name))
            constants = _constants(inner) if isinstance(inner, dict) else None
            if constants is not None:
                self._properties[name] = constants

    def excludes(self, other: _Values) -> bool:
        """Tell whether it is certain that no value belongs to both."""
        if self._types and other._types and not self._types & other._types:
            return True
        if self._constants is not None and other._constants is not None and not self._constants & other._constants:
            return True
        if self._types != {"object"} or other._types != {"object"}:
            return False
        return any(
            not constants & other._properties[name]
            for name, constants in self._properties.items()
            if name in other._properties
        )


def _constants(schema: Schema) -> set[str] | None:
    """Return the only values a schema can have, as text; None when it does not say."""
    if "const" in schema:
        return {_canonical(schema["const"])}
    if "enum" in schema:
        return {_canonical(value) for value in schema["enum"]}
    return None


def _canonical(value: Any) -> str:
    """Return one text for all ways to write a value; 1 and 1.0 are the same number."""
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return json.dumps(value, sort_keys=True)


def end_recursion(visitor: SchemaVisitor) -> None:
    """Turn what recurses without end into a schema without values.

    A value of such a schema would have to hold another, and so on. The least set of schemas that have an end is built
    up from those that need no others; what stays outside has none.

    Raises:
        FormatError: the whole schema recurses without end.
    """
    order = _children_first(visitor)
    ended: set[str] = set()
    for _ in range(_MAX_ROUNDS):
        before = len(ended)
        for place in order:
            if place not in ended and _has_end(visitor, place, ended):
                ended.add(place)
        if len(ended) == before:
            break
    else:
        raise FormatError("the references in the schema are too entangled; use fewer that lead to each other")
    waiting = [place for place in order if place not in ended]
    if "#" in waiting:
        place = min((place for place in waiting if place in visitor.references), key=len, default="#")
        raise FormatError(
            f"the schema at {place} recurses without end, so that no value can satisfy it; "
            "make a property on the way optional, or allow null there"
        )
    for place in waiting:
        schema = visitor.schemas[place]
        if isinstance(schema, dict):
            # Others may lead to what is defined here.
            for keyword in schema.keys() - {"$defs", "definitions"}:
                del schema[keyword]
            schema["enum"] = []


def _children_first(visitor: SchemaVisitor) -> list[str]:
    """Return all places, each after those it leads to where they do not lead back to it."""
    order: list[str] = []
    seen = {"#"}
    path = [("#", iter(visitor.uses.get("#", ())))]
    while path:
        place, uses = path[-1]
        following = next((used for used in uses if used not in seen), None)
        if following is None:
            order.append(place)
            path.pop()
        else:
            seen.add(following)
            path.append((following, iter(visitor.uses.get(following, ()))))
    return order


def _has_end(visitor: SchemaVisitor, place: str, ended: set[str]) -> bool:
    """Tell whether a schema has a value that needs only schemas in *ended*."""
    schema = visitor.schemas[place]
    if isinstance(schema, bool):
        # That false has no values at all is for llguidance to say.
        return True
    if place in visitor.references and visitor.references[place] not in ended:
        return False
    if not all(pointer(place, "allOf", index) in ended for index in range(len(schema.get("allOf", ())))):
        return False
    for keyword in ("anyOf", "oneOf"):
        count = len(schema.get(keyword, ()))
        if count and not any(pointer(place, keyword, index) in ended for index in range(count)):
            return False
    if "const" in schema or "enum" in schema or "type" not in schema:
        return True
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return (
        not _SCALARS.isdisjoint(types)
        or ("object" in types and _object_has_end(place, schema, ended))
        or ("array" in types and _array_has_end(place, schema, ended))
    )


def _object_has_end(place: str, schema: Schema, ended: set[str]) -> bool:
    for name in schema.get("required", ()):
        if name in schema.get("properties", {}):
            if pointer(place, "properties", name) not in ended:
                return False
        elif (
            not schema.get("patternProperties")
            and "additionalProperties" in schema
            and pointer(place, "additionalProperties") not in ended
        ):
            return False
    return True


def _array_has_end(place: str, schema: Schema, ended: set[str]) -> bool:
    needed = schema.get("minItems", 0)
    first = "prefixItems" if "prefixItems" in schema else "items"
    listed = schema.get(first, [])
    count = len(listed) if isinstance(listed, list) else 0
    if not all(pointer(place, first, index) in ended for index in range(min(needed, count))):
        return False
    rest = "items" if first == "prefixItems" or not isinstance(listed, list) else "additionalItems"
    return needed <= count or rest not in schema or pointer(place, rest) in ended
