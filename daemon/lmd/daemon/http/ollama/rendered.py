"""`_debug_render_only`: what a model would read, instead of what it answers."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from lmd.daemon.catalog import ResolvedModel
from lmd.daemon.conversations import Think, Turn
from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.ollama.replies import head, json_response
from lmd.daemon.http.ollama.requests import GenerateBody
from lmd.daemon.http.services import Services
from lmd.daemon.model_calls import Caller


async def rendered_prompt(
    services: Services, model: ResolvedModel, body: GenerateBody, turns: list[Turn], think: Think | None, caller: Caller
) -> str:
    """Return the prompt that a request to generate makes; *turns* are those it stands for.

    Raises:
        Refusal: the request asks for what only a runner puts together.
        LmdError: as `Tokenizing.apply_template`.
    """
    if body.raw:
        return body.prompt or ""
    if body.template or body.suffix:
        raise Refusal(400, f"_debug_render_only does not go with {'template' if body.template else 'suffix'}")
    if "chat" not in model.capabilities:
        system = body.system or model.system
        return "\n\n".join(text for text in (system, body.prompt) if text)
    prompt = await services.tokenizing.apply_template(
        model=body.model or "", messages=turns, think=think, caller=caller
    )
    return prompt.text


def debug_response(model: str, content: Mapping[str, object], text: str) -> Response:
    """Return a rendered prompt."""
    return json_response({**head(model), **content, "done": False, "_debug_info": {"rendered_template": text}})
