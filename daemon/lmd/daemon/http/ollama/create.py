"""Makes models of uploaded files and of other models."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from lmd.daemon.creating import Quantization, make
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.ollama.manage_replies import Step, as_it_is, cut, managing, progress_reply
from lmd.daemon.http.ollama.manage_requests import CreateBody
from lmd.daemon.http.ollama.pull import SUCCESS, WRITING, PullProgress, pull_refusal
from lmd.daemon.http.ollama.recipes import Recipe, recipe_of
from lmd.daemon.http.services import Services
from lmd.daemon.names import new_name
from lmd.daemon.quantizer import WorkProgress
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRef, InvalidRequest, LmdError, ModelNotFound, SourceError
from lmd.registry.pull import PullEvent
from lmd.registry.quantization import parse_quant_type

#: Stands where the digest of what is transferred would, as in the releases of Ollama that quantized.
_NO_DIGEST = "0000000000000000000"


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the route."""

    async def create(request: Request) -> Response:
        body = await read_model(request, CreateBody)
        try:
            name = new_name(body.wanted, "model")
        except (InvalidRef, InvalidRequest) as error:
            raise Refusal(400, "invalid model name") from error
        recipe = recipe_of(body)
        await _check_uploaded(services, recipe.files)
        steps = create_steps(services, name, recipe, quantize=_quantize(body))
        return await progress_reply(steps, stream=body.streams, translate=create_refusal)

    return [managing("/api/create", create, ["POST"])]


async def create_steps(
    services: Services, name: str, recipe: Recipe, *, quantize: str = ""
) -> AsyncGenerator[Step, None]:
    """Make a model, pulling the one it builds on when it is not here; closing the iterator is leaving that pull.

    Raises: as `make`.
    """
    if recipe.files:
        yield {"status": "parsing GGUF"}
    progress = PullProgress()
    steps = make(
        services.catalog,
        services.pulls,
        name=name,
        recipe=recipe.modelfile,
        files=recipe.files,
        quantization=Quantization(services.quantizer, quantize),
    )
    working = ""
    async with aclosing(steps):
        async for step in steps:
            if isinstance(step, PullEvent):
                for told in progress.steps(step):
                    yield told
            elif isinstance(step, WorkProgress):
                yield {
                    "status": working,
                    "digest": _NO_DIGEST,
                    "total": step.total_bytes,
                    "completed": step.completed_bytes,
                }
            elif isinstance(step, str) and step.startswith("quantizing "):
                working = step.replace(" to ", " model to ")
            elif isinstance(step, str) and step.startswith("merging "):
                working = step
            elif isinstance(step, str) and not step.startswith(("pulling ", "creating ")):
                yield {"status": step}
            elif isinstance(step, str) and step.startswith("pulling "):
                yield {"status": "pulling manifest"}
            elif isinstance(step, str):
                for digest in dict.fromkeys(recipe.files.values()):
                    yield {"status": f"using existing layer {digest}"}
                yield WRITING
    yield SUCCESS


def _quantize(body: CreateBody) -> str:
    """Return the type to quantize to, "" for none. Raises: Refusal."""
    if not body.quantize:
        return ""
    try:
        return parse_quant_type(body.quantize).name
    except InvalidRequest as error:
        raise Refusal(400, f"{error.message}; {error.hint}") from error


def create_refusal(error: LmdError) -> Refusal:
    """Return how a model that was not made is told."""
    return pull_refusal(error) if isinstance(error, ModelNotFound | SourceError) else as_it_is(error)


async def _check_uploaded(services: Services, files: Mapping[str, Digest]) -> None:
    """Refuse files that are not here while the answer can still have a status; those that are here stay.

    Raises: Refusal.
    """
    for name, digest in files.items():
        if not await services.uploads.keep(digest):
            raise Refusal(400, f'the blob {digest} of the file "{cut(name)}" is not here; send it to /api/blobs first')
