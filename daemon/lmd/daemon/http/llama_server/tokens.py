"""`POST /tokenize`, `/detokenize` and `/apply-template`: what a model reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lmd.daemon.conversations import Tools
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import http_caller
from lmd.daemon.http.durations import duration_of
from lmd.daemon.http.llama_server.errors import llama_server_endpoint
from lmd.daemon.http.llama_server.requests import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest
from lmd.daemon.http.llama_server.resident import model_of
from lmd.daemon.http.openai import messages
from lmd.daemon.http.openai.options import think_of_arguments
from lmd.daemon.http.services import Services
from lmd.daemon.tokenizing import Tokens
from lmd.registry.errors import InvalidRequest
from lmd.registry.parameters import INT32_MAX

#: Tokens above which an answer is written in a thread, so that nobody else waits for that.
_MANY = 50_000


def routes(services: Services) -> list[BaseRoute]:
    """Return the endpoints of tokens and templates."""
    tokenizing, residency = services.tokenizing, services.residency

    async def tokenize(request: Request) -> Response:
        body = await read_model(request, TokenizeRequest)
        tokens = await tokenizing.tokenize(
            model=model_of(body.model, residency),
            text=body.content,
            add_special=bool(body.add_special),
            plain=body.parse_special is False,
            keep_alive=duration_of(body.keep_alive, "keep_alive"),
            caller=http_caller(request),
        )
        with_pieces = bool(body.with_pieces)
        if len(tokens.ids) < _MANY:
            return _json(_tokens(tokens, with_pieces=with_pieces))
        return _json(await asyncio.to_thread(_tokens, tokens, with_pieces=with_pieces))

    async def detokenize(request: Request) -> Response:
        body = await read_model(request, DetokenizeRequest)
        text = await tokenizing.detokenize(
            model=model_of(body.model, residency),
            tokens=_checked(body.tokens),
            keep_alive=duration_of(body.keep_alive, "keep_alive"),
            caller=http_caller(request),
        )
        return JSONResponse({"content": text})

    async def apply_template(request: Request) -> Response:
        body = await read_model(request, ApplyTemplateRequest)
        tools = [messages.tool_of(tool, number) for number, tool in enumerate(body.tools or ())]
        prompt = await tokenizing.apply_template(
            model=model_of(body.model, residency),
            messages=messages.turns_of(body.messages),
            tools=Tools(tuple(tools)).checked() if tools else None,
            think=think_of_arguments(body.chat_template_kwargs),
            keep_alive=duration_of(body.keep_alive, "keep_alive"),
            caller=http_caller(request),
        )
        return JSONResponse({"prompt": prompt.text})

    handlers = {"/tokenize": tokenize, "/detokenize": detokenize, "/apply-template": apply_template}
    return [Route(path, llama_server_endpoint(handler), methods=["POST"]) for path, handler in handlers.items()]


def _json(written: bytes) -> Response:
    return Response(written, media_type="application/json")


def _tokens(tokens: Tokens, *, with_pieces: bool) -> bytes:
    told: Sequence[object] = list(tokens.ids)
    if with_pieces:
        told = [{"id": token, "piece": _piece(piece)} for token, piece in zip(tokens.ids, tokens.pieces, strict=True)]
    return json.dumps({"tokens": told}, ensure_ascii=False).encode()


def _piece(piece: bytes) -> str | list[int]:
    """Return the text of a token, or its bytes when they are no text."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _checked(tokens: Sequence[int]) -> Sequence[int]:
    for token in tokens:
        if not 0 <= token <= INT32_MAX:
            raise InvalidRequest(f"{token} is no token; ids are whole numbers from 0", field="tokens")
    return tokens
