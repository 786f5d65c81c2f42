"""Copies and removes models; refuses to push them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.ollama.manage_replies import as_it_is, cut, managing, model_ref
from lmd.daemon.http.ollama.manage_requests import CopyBody, DeleteBody, PushBody
from lmd.daemon.http.services import Services
from lmd.daemon.names import new_name
from lmd.registry.errors import InvalidRef, InvalidRequest, ModelNotFound


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the routes."""
    manager = Manager(services)
    return [
        managing("/api/copy", manager.copy, ["POST"]),
        managing("/api/delete", manager.delete, ["DELETE"]),
        managing("/api/push", manager.push, ["POST"]),
    ]


class Manager:
    """Handles the names of models."""

    def __init__(self, services: Services) -> None:
        self._catalog = services.catalog

    async def copy(self, request: Request) -> Response:
        """Give a model one more name; the answer has no body."""
        body = await read_model(request, CopyBody)
        source, destination = body.source or "", body.destination or ""
        try:
            model_ref(source)
        except InvalidRef as error:
            raise Refusal(400, f'source "{cut(source)}" is invalid') from error
        try:
            new_name(destination, "destination")
        except (InvalidRef, InvalidRequest) as error:
            raise Refusal(400, f'destination "{cut(destination)}" is invalid') from error
        try:
            await self._catalog.copy(source, destination)
        except ModelNotFound as error:
            raise Refusal(404, f'model "{source}" not found') from error
        return Response(status_code=200)

    async def delete(self, request: Request) -> Response:
        """Take a name away; the answer has no body."""
        name = (await read_model(request, DeleteBody)).wanted
        try:
            model_ref(name)
            await self._catalog.delete(name)
        except InvalidRef as error:
            raise Refusal(400, f'name "{cut(name)}" is invalid') from error
        except ModelNotFound as error:
            raise Refusal(404, f"model '{name}' not found") from error
        return Response(status_code=200)

    async def push(self, request: Request) -> Response:
        """Say that nothing can be pushed, or what else is wrong with the request."""
        name = (await read_model(request, PushBody)).wanted
        if not name:
            raise Refusal(400, "model is required")
        try:
            model_ref(name)
            await self._catalog.find(name)
        except InvalidRef as error:
            raise as_it_is(error) from error
        except ModelNotFound as error:
            raise Refusal(404, f"model '{name}' not found") from error
        raise Refusal(501, "this daemon cannot push models: it knows no registry to push to yet")
