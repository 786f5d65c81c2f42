"""Reads what clients send: strict JSON, within limits, and one readable sentence about what is wrong with it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

M = TypeVar("M", bound=BaseModel)

#: What a body may have when nothing was configured; the configured limit travels in the scope under this name.
DEFAULT_LIMIT_BYTES = 64 << 20
LIMIT_KEY = "lmd.body_limit_bytes"
#: Arrays and objects within each other; a JSON Schema of tools is the deepest thing anybody sends.
MAX_DEPTH = 128
#: A number with more characters than this is none that anybody means.
MAX_NUMBER_CHARS = 400

_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|([\[{])|[\]}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class BodyError(Exception):
    """Raised when a body cannot be used; *field* is the path of the value that is wrong, empty for the whole."""

    def __init__(self, message: str, *, field: str = "", status: Literal[400, 413, 415] = 400) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.status = status


async def read_body(request: Request) -> bytes:
    """Return the whole body.

    Raises:
        BodyError: it is larger than the limit, or compressed.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise BodyError(f"content-encoding {encoding[:40]!r} is not supported; send the body as it is", status=415)
    limit_bytes: int = request.scope.get(LIMIT_KEY, DEFAULT_LIMIT_BYTES)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit_bytes:
        _too_large(limit_bytes)
    pieces: list[bytes] = []
    size_bytes = 0
    async for piece in request.stream():
        size_bytes += len(piece)
        if size_bytes > limit_bytes:
            _too_large(limit_bytes)
        pieces.append(piece)
    return b"".join(pieces)


async def read_json(request: Request) -> object:
    """Return the body as a JSON value.

    Raises:
        BodyError: it is empty, too large, not UTF-8, not JSON, nested too deeply, or names a key twice.
    """
    return parse_json(await read_body(request))


async def read_model(request: Request, kind: type[M]) -> M:
    """Return the body as a *kind*; fields that it does not know are its own business.

    Raises:
        BodyError: as `read_json`, or a field is missing or of a wrong type.
    """
    return as_model(await read_json(request), kind)


def parse_json(body: bytes) -> object:
    """Return *body* as a JSON value. Half a surrogate pair becomes U+FFFD, as in Go and browsers.

    Raises:
        BodyError: as `read_json`.
    """
    if not body.strip():
        raise BodyError("missing request body")
    _check_depth(body)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise BodyError(f"the body is not UTF-8: byte {error.start} starts no character") from None
    try:
        value: object = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise BodyError(message) from None
    return _whole(value) if _SURROGATE_ESCAPE.search(body) else value


def as_model(value: object, kind: type[M]) -> M:
    """Return *value* as a *kind*.

    Raises:
        BodyError: with the first thing that is wrong.
    """
    if not isinstance(value, dict):
        raise BodyError(f"the body must be a JSON object, not {_kind_of(value)}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explained(value, error) from None


def _explained(value: object, error: ValidationError) -> BodyError:
    problems = error.errors(include_url=False)
    # Of the members of a union, the one that got furthest is the one that was meant.
    first = max(problems, key=lambda problem: len(_path(value, problem["loc"], problem["type"])))
    if len({_path(value, problem["loc"], problem["type"])[:1] for problem in problems}) > 1:
        first = problems[0]
    path = _path(value, first["loc"], first["type"])
    field = ".".join(map(str, path))
    if first["type"] == "missing":
        return BodyError(f"`{field}` is missing", field=field)
    if first["type"] == "extra_forbidden":
        return BodyError(f"`{field}` is not known", field=field)
    why = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    why = why[:1].lower() + why[1:]
    if not field:
        return BodyError(why)
    return BodyError(why if f"`{path[-1]}`" in why else f"`{field}`: {why}", field=field)


def _path(value: object, loc: Sequence[int | str], kind: str) -> tuple[int | str, ...]:
    """Return the part of *loc* that leads through *value*: pydantic also names the members of unions it tried."""
    path: list[int | str] = []
    for index, part in enumerate(loc):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not (kind == "missing" and index == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _BRACKETS.finditer(body):
        if match.lastindex:
            depth += 1
            if depth > MAX_DEPTH:
                raise BodyError(f"the body is nested more than {MAX_DEPTH} levels deep")
        elif match[0] in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BodyError(f"the body names the key {key[:80]!r} twice in one object", field=key[:80])
            seen.add(key)
    return made


def _constant(name: str) -> NoReturn:
    raise BodyError(f"the body is not JSON: {name} is no number")


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARS:
        raise BodyError(f"the number {text[:20]}… is out of range")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BodyError(f"the number {text[:20]} is out of range")
    return number


def _whole(value: Any) -> Any:
    """Replace half surrogate pairs in every text of *value*."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return value


def _kind_of(value: object) -> str:
    if value is None:
        return "null"
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "a string", list: "an array"}
    return kinds[type(value)]


def _too_large(limit_bytes: int) -> NoReturn:
    raise BodyError(f"the body is larger than {limit_bytes} bytes", status=413)
