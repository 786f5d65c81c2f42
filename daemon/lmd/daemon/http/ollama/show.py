"""Shows everything about a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.ollama.manage_replies import as_it_is, managing, model_ref
from lmd.daemon.http.ollama.manage_requests import ShowBody
from lmd.daemon.http.ollama.replies import JSON, encoded
from lmd.daemon.http.ollama.shapes import details, shown_capabilities, time_text
from lmd.daemon.http.services import Services
from lmd.registry.errors import InvalidRef, ModelNotFound
from lmd.registry.gguf import GgufArray, GgufHeader, float_text
from lmd.registry.inspect import ModelFacts
from lmd.registry.parameters import ParameterValue

#: Arrays with more items are empty unless the request is verbose.
MAX_SHOWN_ITEMS = 5
PARAMETER_COLUMNS = 30
#: Shown elsewhere, or not by Ollama.
_LEFT_OUT = frozenset({"general.name", "tokenizer.chat_template"})
#: This client shows `general.basename` where it should show the name that its user chose.
_SHOWS_BASENAME = "GitHubCopilotChat/"


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the route."""

    async def show(request: Request) -> Response:
        body = await read_model(request, ShowBody)
        return Response(
            await show_model(services, body, user_agent=request.headers.get("user-agent", "")), media_type=JSON
        )

    return [managing("/api/show", show, ["POST"])]


async def show_model(services: Services, body: ShowBody, *, user_agent: str) -> bytes:
    """Return the answer to a request. Raises: Refusal, and LmdError for damaged models."""
    if not body.wanted:
        raise Refusal(400, "model is required")
    catalog = services.catalog
    try:
        ref = model_ref(body.wanted)
        facts = await catalog.info(body.wanted)
    except InvalidRef as error:
        raise as_it_is(error) from error
    except ModelNotFound as error:
        raise Refusal(404, f"model '{ref.name}' not found") from error
    verbose = bool(body.verbose)
    header = await catalog.header(facts, "weights", whole=verbose)
    projector = await catalog.header(facts, "projector", whole=verbose)
    assert header is not None, "a model without weights"
    basename = body.wanted if user_agent.startswith(_SHOWS_BASENAME) else ""

    def write() -> bytes:
        return encoded(_answer(facts, header, projector, body, basename))

    # In verbose answers there are whole tokenizers.
    return await services.pool.run(write) if verbose else write()


def _answer(
    facts: ModelFacts, header: GgufHeader, projector: GgufHeader | None, body: ShowBody, basename: str
) -> dict[str, object]:
    verbose = bool(body.verbose)
    info = {**shown_metadata(header, verbose=verbose), "general.parameter_count": facts.parameter_count}
    if basename:
        info["general.basename"] = basename
    texts = {
        "license": "\n".join(facts.licenses),
        "modelfile": facts.modelfile,
        "parameters": parameters_text(facts.parameters),
        "template": body.template or facts.template,
        "system": body.system or facts.system,
    }
    answer: dict[str, object] = {key: text for key, text in texts.items() if text}
    answer["details"] = details(facts)
    if facts.messages:
        answer["messages"] = [{"role": message.role, "content": message.content} for message in facts.messages]
    answer["model_info"] = info
    if projector is not None:
        answer["projector_info"] = shown_metadata(projector, verbose=verbose)
    if verbose:
        answer["tensors"] = [
            {"name": tensor.name, "type": tensor.type_name, "shape": tensor.shape} for tensor in header.tensors
        ]
    if facts.requires:
        answer["requires"] = facts.requires
    answer["capabilities"] = shown_capabilities(facts.capabilities)
    answer["modified_at"] = time_text(facts.modified_at)
    return answer


def shown_metadata(header: GgufHeader, *, verbose: bool) -> dict[str, object]:
    """Return the metadata of a GGUF; the values of long arrays are left out unless *verbose*."""
    return {key: _shown(value, verbose) for key, value in header.metadata.items() if key not in _LEFT_OUT}


def _shown(value: object, verbose: bool) -> object:
    if isinstance(value, GgufArray):
        if value.length > MAX_SHOWN_ITEMS and not verbose:
            return []
        return [_shown(item, verbose) for item in value.values]
    if not isinstance(value, float):
        return value
    # JSON has no infinities, and files of anybody may have one.
    return float(float_text(value)) if math.isfinite(value) else None


def parameters_text(parameters: Mapping[str, ParameterValue]) -> str:
    """Return settings line by line, in two columns; texts are quoted, and have one line each."""
    return "\n".join(f"{name:<{PARAMETER_COLUMNS}} {text}" for name, text in _parameter_lines(parameters))


def _parameter_lines(parameters: Mapping[str, ParameterValue]) -> Iterator[tuple[str, str]]:
    for name, value in sorted(parameters.items()):
        if isinstance(value, tuple):
            for text in value:
                yield name, json.dumps(text, ensure_ascii=False)
        elif isinstance(value, str):
            yield name, value
        elif isinstance(value, bool):
            yield name, "true" if value else "false"
        else:
            yield name, f"{value:g}" if isinstance(value, float) and value.is_integer() else repr(value)
