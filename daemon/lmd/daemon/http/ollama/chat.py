"""`POST /api/chat`: answers a chat, loads a model, unloads it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.callers import caller_of
from lmd.daemon.http.ollama.answers import Telling, answer, chat_content
from lmd.daemon.http.ollama.failures import Refusal, answer_refusal, refusing
from lmd.daemon.http.ollama.messages import tools_of, turns_of
from lmd.daemon.http.ollama.options import parameters_of
from lmd.daemon.http.ollama.rendered import debug_response
from lmd.daemon.http.ollama.requests import ChatBody
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
from lmd.daemon.inference import check_template_inputs, require
from lmd.daemon.model_calls import Caller


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the route."""

    async def chat(request: Request) -> Response:
        return await _chat(services, request)

    return [post("/api/chat", chat)]


async def _chat(services: Services, request: Request) -> Response:
    body = await read_model(request, ChatBody)
    # What is wrong with the body comes first, whatever else is.
    keep_alive, think, options = keep_alive_of(body.keep_alive), think_of(body.think), answer_options(body)
    check_top_logprobs(body)
    name, messages = body.model or "", body.messages or []
    if not name:
        raise Refusal(400, "model is required")
    translate = answer_refusal(name)
    with refusing(translate):
        model = await services.catalog.resolve(name)
        if not messages and keep_alive == timedelta(0):
            await unload(services, name)
            return resident_response(name, chat_content("", "", []), "unload")
        check_images(name, [message.images for message in messages])
        tools = tools_of(body.tools)
        require(model, "chat")
        think = effective_think(model, think)
        check_template_inputs(model, tools, think)
        parameters = parameters_of(body.options)
        if not messages:
            await load(services, model, parameters, keep_alive, caller=caller_of(request))
            return resident_response(name, chat_content("", "", []), "load")
        turns, caller = turns_of(messages), caller_of(request)
        if body.debug_render_only:
            prompt = await services.tokenizing.apply_template(
                model=model,
                messages=turns,
                tools=tools,
                think=think,
                keep_alive=keep_alive,
                caller=Caller(caller),
            )
            return debug_response(name, chat_content("", "", []), prompt.text)
        events = services.inference.chat(
            model=model,
            messages=turns,
            tools=tools,
            think=think,
            parameters=parameters,
            keep_alive=keep_alive,
            options=options,
            caller=caller,
        )
    return await answer(events, Telling(name, chat_content, translate), stream=body.stream is not False)
