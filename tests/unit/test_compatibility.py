"""The tables of compatibility say what the program does, and the test that they do notices when they do not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import AliasChoices, BaseModel, Field, RootModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.support import compatibility
from tests.support.compatibility import (
    Fields,
    Table,
    read,
    request_problems,
    response_problems,
    route_problems,
    updated,
)

HEAD = "| endpoint | part | field | supported | notes |\n|---|---|---|---|---|\n"


def test_the_tables_are_well_written() -> None:
    assert not read(compatibility.parts()).problems


def test_every_endpoint_that_is_served_has_a_row_and_no_other_says_so() -> None:
    assert not list(route_problems(read(compatibility.parts()).rows, compatibility.routes()))


def test_every_field_of_a_request_has_a_row_and_no_row_names_another() -> None:
    assert not list(request_problems(read(compatibility.parts()).rows, compatibility.request_models()))


def test_the_index_is_current_and_leads_to_every_part() -> None:
    page = compatibility.PAGE.read_text()
    assert updated(page, read(compatibility.parts()).rows) == page, "run `python -m tests.support.compatibility`"
    assert set(re.findall(r"\]\(compatibility/([^)]+)\)", page)) == {part.name for part in compatibility.parts()}


# What the tests above would notice


def table(tmp_path: Path, *rows: str, head: str = HEAD) -> Table:
    part = tmp_path / "part.md"
    part.write_text("# Part\n\n" + head + "\n".join(rows) + "\n")
    return read([part])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("| `POST /a` | request | `x` | maybe | |", "maybe"),
        ("| `POST /a` | request | `x` | no | |", "not why"),
        ("| `POST /a` | request | `x` | differs | |", "not why"),
        ("| `POST /a` | request | x | yes | |", "backticks"),
        ("| `POST /a` | request | | yes | |", "backticks"),
        ("| `POST /a` | endpoint | `x` | yes | |", "too many"),
        ("| POST /a | endpoint | | yes | |", "VERB"),
        ("| `/a` | endpoint | | yes | |", "VERB"),
        ("| `POST /a` | body | `x` | yes | |", "none of"),
        ("| `POST /a` | request | `x` | yes |", "4 cells"),
    ],
)
def test_rows_that_say_too_little_are_told(tmp_path: Path, row: str, told: str) -> None:
    found = table(tmp_path, row)
    assert not found.rows
    assert [problem for problem in found.problems if told in problem and "part.md:5" in problem]


def test_tables_with_other_columns_and_rows_that_stand_twice_are_told(tmp_path: Path) -> None:
    assert table(tmp_path, head="| endpoint | field |\n|---|---|\n").problems
    row = "| `POST /a` | request | `x` | yes | |"
    assert "already" in table(tmp_path, row, row).problems[0]


async def _answer(request: Request) -> Response:
    return Response()


ROUTES = [
    Route("/a", _answer, methods=["POST"]),
    Route("/a/{name:path}", _answer, methods=["GET"]),
]


def test_endpoints_that_differ_from_the_routes_are_told(tmp_path: Path) -> None:
    def told(*rows: str) -> str:
        return "\n".join(route_problems(table(tmp_path, *rows).rows, ROUTES))

    good = ["| `POST /a` | endpoint | | yes | |", "| `GET /a/{name}` | endpoint | | differs | why |"]
    assert told(*good) == ""
    assert told(*good, "| `HEAD /a/{name}` | endpoint | | yes | |") == ""
    assert told(*good, "| `POST /b` | endpoint | | no | not there |") == ""
    assert "`GET /a/{name}` is served and has no" in told(good[0])
    assert "`POST /b` is not served" in told(*good, "| `POST /b` | endpoint | | yes | |")
    assert "`POST /a` is served" in told("| `POST /a` | endpoint | | no | why |", good[1])
    assert "has no `endpoint` row" in told(*good, "| `PUT /a` | request | `x` | yes | |")


class Part(BaseModel):
    text: str
    inner: list[Part] = []


class Lookup(RootModel[dict[str, Part]]):
    pass


class Body(BaseModel):
    model: str = Field(validation_alias=AliasChoices("model", "name"))
    parts: list[Part] | str | None = None
    kind: Annotated[Literal["a", "b"] | None, Field(alias="type")] = None
    options: dict[str, object] | None = None
    schema_: Annotated[Any, Field(alias="schema")] = None
    lookup: Lookup | None = None
    pair: tuple[int, Part] | None = None


def test_fields_are_found_wherever_they_are() -> None:
    fields = Fields(Body)
    assert fields.names == {
        *("model", "name", "parts", "parts.text", "parts.inner", "type", "options", "schema"),
        *("lookup", "lookup.text", "lookup.inner", "pair", "pair.text", "pair.inner"),
    }
    assert fields.may_have("options.num_ctx")
    assert fields.may_have("schema.type")
    assert fields.may_have("parts.inner.text")  # the model is in itself
    assert not fields.may_have("parts.image")
    assert not fields.may_have("kind")
    assert not fields.may_have("model.x")


def test_a_model_that_takes_more_than_it_names_may_have_anything() -> None:
    class Open(BaseModel, extra="allow"):
        x: int

    assert Fields(Open).may_have("y")


class Small(BaseModel):
    x: int
    y: dict[str, int] = {}


def test_fields_that_differ_from_the_models_are_told(tmp_path: Path) -> None:
    def told(*rows: str) -> str:
        return "\n".join(request_problems(table(tmp_path, *rows).rows, {"/a": Small}))

    good = ["| `POST /a` | request | `x` | yes | |", "| `POST /a` | request | `y` | yes | |"]
    assert told(*good) == ""
    assert told(*good, "| `POST /a` | request | `z` | no | ignored |") == ""
    assert told(*good, "| `POST /a` | response | `z` | yes | |") == ""
    assert told(*good, "| `POST /a` | request | `y.k` | yes | |") == ""
    assert "takes `y`" in told(good[0])
    assert "takes no `z`" in told(*good, "| `POST /a` | request | `z` | yes | |")
    assert "no REQUESTS" in told(*good, "| `POST /b` | request | `x` | yes | |")


def test_fields_of_answers_that_the_tables_do_not_have_are_told(tmp_path: Path) -> None:
    rows = table(
        tmp_path,
        "| `POST /a` | response | `model` | yes | |",
        "| `POST /a` | response | `info` | yes | |",
        "| `POST /a` | response | `message` | yes | |",
        "| `POST /a` | response | `message.content` | yes | |",
        "| `POST /a` | response | `message.refusal` | no | never |",
    ).rows

    def told(answer: object) -> str:
        return "\n".join(response_problems(rows, "POST /a", answer))

    assert told([{"model": "x", "info": {"any": {"thing": 1}}, "message": {"content": ""}}]) == ""
    assert "`seed`" in told({"seed": 1})
    assert "`message.role`" in told({"message": {"role": "x"}})
    assert "part.md:9" in told({"message": {"refusal": "x"}})
    assert "`model`" in "\n".join(response_problems(rows, "POST /b", {"model": "x"}))
