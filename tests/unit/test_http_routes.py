"""The routes of the gateway: what is found, what is not, and in whose words; and the statuses of errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.errors import DeadlineExceeded, Draining, QueueFull
from lmd.daemon.http.adapters import render_plain
from lmd.daemon.http.app import Routes, make_app
from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.endpoint import endpoint
from lmd.daemon.http.errors import STATUSES, retry_after, status_of
from lmd.daemon.http.services import Services
from lmd.daemon.rpc_errors import CODES
from lmd.registry.errors import InvalidRequest, LmdError, ModelNotFound


def envelope(status: int, message: str, error: LmdError | BodyError | None) -> Response:
    return JSONResponse({"error": {"message": message}}, status_code=status)


async def name(request: Request) -> Response:
    return PlainTextResponse(request.path_params.get("name", request.url.path))


def first(services: Services) -> Sequence[BaseRoute]:
    return [
        Route("/api/tags", name),
        Route("/api/tags", name, methods=["DELETE"]),
        Route("/api/show", name, methods=["POST"]),
    ]


def second(services: Services) -> Sequence[BaseRoute]:
    return [Route("/v1/models", name), Route("/v1/models/{name:path}", name), Route("/", name)]


def app() -> Routes:
    return make_app(cast(Services, None), [first, second], {"/v1/": envelope})


async def ask(method: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app()), base_url="http://localhost") as client:
        return await client.request(method, path)


@pytest.mark.parametrize(
    ("method", "path", "text"),
    [
        ("GET", "/", "/"),
        ("GET", "/api/tags", "/api/tags"),
        ("DELETE", "/api/tags", "/api/tags"),
        ("POST", "/api/show?x=/api/tags", "/api/show"),
        ("GET", "/v1/models", "/v1/models"),
        ("GET", "/v1/models/hf.co/a/b:c", "hf.co/a/b:c"),
    ],
)
async def test_routes_of_all_adapters_are_found(method: str, path: str, text: str) -> None:
    answer = await ask(method, path)
    assert (answer.status_code, answer.text) == (200, text)


async def test_head_works_where_get_does() -> None:
    answer = await ask("HEAD", "/api/tags")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("path", ["/nope", "/api", "/api/tags/x", "//api/tags", "/API/tags", "/api/tags//"])
async def test_an_unknown_path_is_plain_text(path: str) -> None:
    answer = await ask("GET", path)
    assert (answer.status_code, answer.text) == (404, "404 page not found")
    assert answer.headers["content-type"].startswith("text/plain")


async def test_a_wrong_verb_is_405_and_says_which_are_right() -> None:
    answer = await ask("GET", "/api/show")
    assert (answer.status_code, answer.text) == (405, "405 method not allowed")
    assert answer.headers["allow"] == "POST"
    assert (await ask("PUT", "/api/tags")).headers["allow"] == "DELETE, GET, HEAD"


async def test_below_a_prefix_the_adapter_speaks() -> None:
    assert (await ask("GET", "/v1/nope")).json() == {"error": {"message": "404 page not found"}}
    answer = await ask("POST", "/v1/models")
    assert (answer.status_code, answer.json()) == (405, {"error": {"message": "405 method not allowed"}})
    assert (await ask("GET", "/v1x")).text == "404 page not found"
    refused = app().failure("/v1/chat/completions", 401, "no")
    assert (refused.status_code, refused.body) == (401, b'{"error":{"message":"no"}}')
    assert app().failure("/api/chat", 401, "no").body == b'{"error":"no"}'


async def test_a_slash_at_the_end_redirects_to_this_server_only() -> None:
    answer = await ask("GET", "/api/tags/?a=b")
    assert (answer.status_code, answer.headers["location"]) == (301, "/api/tags?a=b")
    answer = await ask("POST", "/api/show/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/api/show")
    assert (await ask("GET", "http://localhost//evil.example/")).status_code == 404


# Errors


def test_every_reason_has_a_status() -> None:
    assert STATUSES.keys() == CODES.keys()
    assert all(400 <= status < 600 for status in STATUSES.values())


async def answer_to(error: Exception) -> httpx.Response:
    async def fail(request: Request) -> Response:
        raise error

    routes = [Route("/", endpoint(fail, render_plain))]
    transport = httpx.ASGITransport(Routes(routes, {}))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get("/")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ModelNotFound("x"), 404, "model `x` not found"),
        (InvalidRequest("`a` is wrong", field="a"), 400, "`a` is wrong"),
        (DeadlineExceeded(timeout_s=3), 504, "the request was not done within 3 s"),
        (BodyError("too much", status=413), 413, "too much"),
    ],
)
async def test_an_error_is_told_in_the_adapters_shape(error: Exception, status: int, text: str) -> None:
    answer = await answer_to(error)
    assert (answer.status_code, answer.json()) == (status, {"error": text})


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), LmdError("secret"), KeyError("secret")])
async def test_a_defect_is_logged_and_not_told(error: Exception) -> None:
    answer = await answer_to(error)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "error_id" in answer.text


async def test_who_should_try_again_is_told_when() -> None:
    answer = await answer_to(QueueFull(limit=3, retry_after_s=1.2))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert retry_after(Draining()) == "5"
    assert retry_after(ModelNotFound("x")) == ""
    assert status_of(Draining()) == 503
