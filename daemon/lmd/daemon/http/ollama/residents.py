"""Loads and unloads models for requests that ask for nothing else: an empty prompt, no messages, no input."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import aclosing
from datetime import timedelta

from starlette.responses import Response

from lmd.daemon.catalog import ResolvedModel
from lmd.daemon.http.ollama.replies import head, json_response
from lmd.daemon.http.services import Services
from lmd.daemon.unloading import unload_model
from lmd.registry.errors import ModelNotFound


async def load(
    services: Services,
    model: ResolvedModel,
    parameters: Mapping[str, object],
    keep_alive: timedelta | None,
    *,
    caller: str,
) -> None:
    """Return when a model is resident.

    Raises:
        LmdError: as `Residency.load`.
    """
    async with aclosing(services.residency.load(model, parameters, keep_alive, caller=caller)) as events:
        async for _ in events:
            pass


async def unload(services: Services, name: str) -> None:
    """Let a model go when its running answers are done; one that is not resident is no error."""
    with contextlib.suppress(ModelNotFound):
        await unload_model(services.catalog, services.residency, name, force=False)


def resident_response(model: str, content: Mapping[str, object], reason: str) -> Response:
    """Return what tells that a model was loaded or unloaded: one object, also where a stream was asked for."""
    return json_response({**head(model), **content, "done": True, "done_reason": reason})
