"""`POST /api/generate`: continues a prompt, loads a model, unloads it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from datetime import timedelta

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from lmd.daemon.answer_events import Event
from lmd.daemon.answer_options import AnswerOptions
from lmd.daemon.catalog import ResolvedModel
from lmd.daemon.conversations import Think, Turn
from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import caller_of, http_caller
from lmd.daemon.http.ollama.answers import Telling, answer, generate_content
from lmd.daemon.http.ollama.failures import Refusal, answer_refusal, refusing
from lmd.daemon.http.ollama.memory import continued, recalled, remembered
from lmd.daemon.http.ollama.options import parameters_of
from lmd.daemon.http.ollama.rendered import debug_response, rendered_prompt
from lmd.daemon.http.ollama.requests import GenerateBody
from lmd.daemon.http.ollama.residents import load, resident_response, unload
from lmd.daemon.http.ollama.route import post
from lmd.daemon.http.ollama.wishes import (
    answer_options,
    check_images,
    check_top_logprobs,
    effective_think,
    keep_alive_of,
    think_of,
)
from lmd.daemon.http.services import Services


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the route."""

    async def generate(request: Request) -> Response:
        return await _generate(services, request)

    return [post("/api/generate", generate)]


async def _generate(services: Services, request: Request) -> Response:
    body = await read_model(request, GenerateBody)
    # What is wrong with the body comes first, whatever else is.
    keep_alive, think, options = keep_alive_of(body.keep_alive), think_of(body.think), answer_options(body)
    check_top_logprobs(body)
    name, prompt = body.model or "", body.prompt or ""
    if not name:
        raise Refusal(404, "model '' not found")
    translate = answer_refusal(name)
    with refusing(translate):
        model = await services.catalog.resolve(name)
        if not prompt and keep_alive == timedelta(0):
            await unload(services, name)
            return resident_response(name, generate_content("", "", []), "unload")
        _check_combination(body)
        check_images(name, [body.images])
        think = effective_think(model, think)
        parameters = parameters_of(body.options)
        if not prompt:
            await load(services, model, parameters, keep_alive, caller=caller_of(request))
            return resident_response(name, generate_content("", "", []), "load")
        turns = continued(recalled(body.context), body.system or "", prompt)
        if body.debug_render_only:
            text = await rendered_prompt(services, model, body, turns, think, http_caller(request))
            return debug_response(name, {"response": ""}, text)

    def last(text: str) -> dict[str, object]:
        if body.raw or body.template or body.suffix:
            return {}
        return {"context": remembered([*turns, Turn("assistant", text)])}

    events = _events(services, body, model, turns, think, parameters, keep_alive, options, caller_of(request))
    return await answer(events, Telling(name, generate_content, translate, last), stream=body.stream is not False)


def _check_combination(body: GenerateBody) -> None:
    if body.raw and (body.template or body.system or body.context):
        raise Refusal(400, "raw mode does not support template, system, or context")
    if body.context and (body.template or body.suffix):
        raise Refusal(400, f"context does not go with {'template' if body.template else 'suffix'}")


def _events(
    services: Services,
    body: GenerateBody,
    model: ResolvedModel,
    turns: Sequence[Turn],
    think: Think | None,
    parameters: dict[str, object],
    keep_alive: timedelta | None,
    options: AnswerOptions,
    caller: str,
) -> AsyncGenerator[Event, None]:
    """Start the answer: a chat when there were turns before, a prompt otherwise."""
    if body.context and "chat" in model.capabilities:
        return services.inference.chat(
            model=model,
            messages=turns,
            think=think,
            parameters=parameters,
            keep_alive=keep_alive,
            options=options,
            caller=caller,
        )
    # A model without a template goes on where the text ended.
    prompt = "".join(turn.content for turn in turns if turn.role != "system")
    systems = [turn.content for turn in turns if turn.role == "system"]
    return services.inference.generate(
        model=model,
        prompt=prompt,
        system=systems[0] if systems else None,
        raw=bool(body.raw),
        suffix=body.suffix or "",
        template=body.template or "",
        think=None if body.raw or body.suffix else think,
        parameters=parameters,
        keep_alive=keep_alive,
        options=options,
        caller=caller,
    )
