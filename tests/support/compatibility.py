"""Keeps docs/reference/compatibility.md and its parts true.

The parts are tables that the adapters' authors write; here they are read and compared with the routes and the request
models of the program. `python -m tests.support.compatibility` writes the index of the page.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin
from unittest.mock import MagicMock

from pydantic import AliasChoices, BaseModel, RootModel
from pydantic.fields import FieldInfo
from starlette.routing import BaseRoute, Route

import lmd.daemon.http
from lmd.daemon.http.adapters import ADAPTERS
from lmd.daemon.http.counting import template_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "compatibility.md"
PARTS = PAGE.parent / "compatibility"

PARTS_OF_ENDPOINTS = ("endpoint", "request", "response", "header", "query", "path", "event")
SUPPORTED = ("yes", "no", "differs")
_COLUMNS = ["endpoint", "part", "field", "supported", "notes"]
_ENDPOINT = re.compile(r"`((?:GET|HEAD|POST|PUT|DELETE) (/\S*))`")
_BLOCK = re.compile(r"<!-- endpoints -->\n.*?<!-- end -->", re.DOTALL)
#: Not of anybody's API.
_OUR_OWN = {"/metrics"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table; *where* is its file and line."""

    where: str
    endpoint: str
    part: str
    field: str
    supported: str
    notes: str

    @property
    def path(self) -> str:
        return self.endpoint.partition(" ")[2]


@dataclass(slots=True)
class Table:
    """The rows of all parts, and what is wrong with how they are written."""

    rows: list[Row]
    problems: list[str]


def read(files: Iterable[Path]) -> Table:
    """Read the tables of *files*."""
    table = Table([], [])
    for file in files:
        _read_text(file.name, file.read_text(), table)
    seen: dict[tuple[str, str, str], str] = {}
    for row in table.rows:
        key = row.endpoint, row.part, row.field
        if key in seen:
            table.problems.append(f"{row.where}: stands in {seen[key]} already")
        seen[key] = row.where
    return table


def _read_text(name: str, text: str, table: Table) -> None:
    in_table = False
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{name}:{number}"
        if not line.startswith("|"):
            in_table = False
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not in_table:
            in_table = True
            if cells != _COLUMNS:
                table.problems.append(f"{where}: the columns must be {' | '.join(_COLUMNS)}")
            continue
        if all(set(cell) <= {"-", ":"} and cell for cell in cells):
            continue
        if isinstance(row := _row(where, cells), Row):
            table.rows.append(row)
        else:
            table.problems.append(row)


def _row(where: str, cells: Sequence[str]) -> Row | str:
    if len(cells) != len(_COLUMNS):
        return f"{where}: {len(cells)} cells instead of {len(_COLUMNS)}"
    endpoint, part, field, supported, notes = cells
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None:
        return f"{where}: {endpoint!r} is no `VERB /path`"
    if part not in PARTS_OF_ENDPOINTS:
        return f"{where}: {part!r} is none of {', '.join(PARTS_OF_ENDPOINTS)}"
    if (part == "endpoint") == bool(field) or not re.fullmatch(r"(`[^`\s]+`)?", field):
        return f"{where}: {field!r} is no field in backticks, or one too many"
    if supported not in SUPPORTED:
        return f"{where}: {supported!r} is none of {', '.join(SUPPORTED)}"
    if supported != "yes" and not notes:
        return f"{where}: says `{supported}` and not why"
    return Row(where, found[1], part, field.strip("`"), supported, notes)


# Routes


def routes() -> list[Route]:
    """Return the routes of all adapters."""
    services = MagicMock()
    found: list[BaseRoute] = [route for adapter in ADAPTERS for route in adapter(services)]
    return [route for route in found if isinstance(route, Route)]


def route_problems(rows: Sequence[Row], known: Iterable[Route]) -> Iterator[str]:
    """Yield what the tables and the program say differently of endpoints."""
    said = {row.endpoint: row for row in rows if row.part == "endpoint"}
    served: set[str] = set()
    for route in known:
        path = template_of(route.path)
        verbs = set(route.methods or {"GET"})
        served.update(f"{verb} {path}" for verb in verbs)
        for verb in sorted(verbs - ({"HEAD"} if "GET" in verbs else set())):
            if path not in _OUR_OWN and f"{verb} {path}" not in said:
                yield f"`{verb} {path}` is served and has no `endpoint` row"
    for endpoint, row in said.items():
        if row.supported == "no" and endpoint in served:
            yield f"{row.where}: `{endpoint}` is served"
        if row.supported != "no" and endpoint not in served:
            yield f"{row.where}: `{endpoint}` is not served"
    for row in rows:
        if row.endpoint not in said:
            yield f"{row.where}: `{row.endpoint}` has no `endpoint` row"


# Fields of requests


def request_models() -> dict[str, type[BaseModel]]:
    """Return the models of all bodies, by the paths that take them."""
    found: dict[str, type[BaseModel]] = {}
    package = lmd.daemon.http
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.endswith("requests"):
            models: Mapping[str, type[BaseModel]] = getattr(importlib.import_module(module.name), "REQUESTS", {})
            twice = found.keys() & models.keys()
            assert not twice, f"{module.name}: {twice} stand in another module too"
            found.update(models)
    return found


def request_problems(rows: Sequence[Row], models: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    """Yield what the tables and the program say differently of the fields of requests."""
    for key, model in models.items():
        mine = {row.field: row for row in rows if row.part == "request" and key in (row.path, row.endpoint)}
        fields = Fields(model)
        for name in sorted(fields.names - mine.keys()):
            yield f"`{key}` takes `{name}`, and there is no `request` row for it"
        for name, row in mine.items():
            if row.supported != "no" and not fields.may_have(name):
                yield f"{row.where}: `{key}` takes no `{name}`"
    for row in rows:
        if row.part == "request" and row.supported != "no" and not {row.path, row.endpoint} & models.keys():
            yield f"{row.where}: no REQUESTS has a model for `{row.endpoint}`"


class Fields:
    """The fields of a request: dotted names, as they stand in JSON. Below those that are *free* anything may stand."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.names: set[str] = set()
        self.free: set[str] = set()
        self._add(model, "", ())

    def may_have(self, name: str) -> bool:
        """Tell whether a request may have the field."""
        parents = {""} | {name[: match.start()] for match in re.finditer(r"\.", name)}
        return name in self.names or bool(parents & self.free)

    def _add(self, model: type[BaseModel], prefix: str, above: tuple[type[BaseModel], ...]) -> None:
        if model in above:
            self.free.add(prefix)
            return
        if issubclass(model, RootModel):
            self._descend(model.model_fields["root"].annotation, prefix, (*above, model))
            return
        if model.model_config.get("extra") == "allow":
            self.free.add(prefix)
        for python_name, field in model.model_fields.items():
            for wire_name in _wire_names(python_name, field):
                name = f"{prefix}.{wire_name}" if prefix else wire_name
                self.names.add(name)
                self._descend(field.annotation, name, (*above, model))

    def _descend(self, annotation: Any, name: str, above: tuple[type[BaseModel], ...]) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            self._add(annotation, name, above)
            return
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            self._descend(arguments[0], name, above)
        elif origin in (Union, UnionType):
            for member in arguments:
                self._descend(member, name, above)
        elif origin is not None and arguments and _is_mapping(origin):
            self.free.add(name)
            self._descend(arguments[1], name, above)
        elif origin is not None and arguments and str(origin) != "typing.Literal":
            for member in arguments:
                self._descend(member, name, above)
        elif annotation in (Any, object) or (isinstance(annotation, type) and _is_mapping(annotation)):
            self.free.add(name)


def _wire_names(python_name: str, field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return [choice for choice in alias.choices if isinstance(choice, str)]
    return [alias if isinstance(alias, str) else field.alias or python_name]


def _is_mapping(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Mapping)


# Fields of answers


def response_problems(rows: Sequence[Row], endpoint: str, answer: object) -> Iterator[str]:
    """Yield what an answer has and the tables do not say.

    A field whose parts have rows needs none itself; below one whose parts have none, anything may stand.
    """
    said = {row.field: row for row in rows if row.part in ("response", "event") and row.endpoint == endpoint}
    parents = {name[: match.start()] for name in said for match in re.finditer(r"\.", name)}
    for name in sorted(_names_in(answer)):
        row = said.get(name)
        above = name.rpartition(".")[0]
        while above and above not in said and above not in parents:
            above = above.rpartition(".")[0]
        if row is None and name not in parents and (not above or above in parents):
            yield f"`{endpoint}` answers with `{name}`, and no `response` or `event` row says so"
        if row is not None and row.supported == "no":
            yield f"{row.where}: `{endpoint}` answers with `{name}`"


def _names_in(value: object, prefix: str = "") -> set[str]:
    if isinstance(value, list):
        return {name for item in value for name in _names_in(item, prefix)}
    if not isinstance(value, dict):
        return set()
    names: set[str] = set()
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else key
        names |= {name} | _names_in(inner, name)
    return names


# The page


def updated(page: str, rows: Sequence[Row]) -> str:
    """Return *page* with the current index of endpoints."""
    lines = ["| endpoint | supported | notes | fields |", "|---|---|---|---|"]
    for row in sorted((row for row in rows if row.part == "endpoint"), key=lambda row: (row.path, row.endpoint)):
        part = row.where.partition(":")[0]
        counts = [
            sum(r.endpoint == row.endpoint and r.field != "" and r.supported == s for r in rows) for s in SUPPORTED
        ]
        told = ", ".join(f"{count} {word}" for count, word in zip(counts, SUPPORTED, strict=True) if count)
        lines.append(f"| `{row.endpoint}` | {row.supported} | {row.notes} | [{told or '-'}](compatibility/{part}) |")
    return _BLOCK.sub(lambda _: "<!-- endpoints -->\n" + "\n".join(lines) + "\n<!-- end -->", page)


def parts() -> list[Path]:
    """Return the files with the tables."""
    return sorted(PARTS.glob("*.md"))


def main() -> None:
    """Write the page."""
    PAGE.write_text(updated(PAGE.read_text(), read(parts()).rows))


if __name__ == "__main__":
    main()
