"""InferenceService: translates messages; the behaviour is in `lmd.daemon.inference`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta

import grpc.aio

from lmd.daemon.callers import HasPeer, caller_of
from lmd.daemon.inference import Inference
from lmd.daemon.services.answers import event_fields, options_of, think_of, tools_of, turns_of
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import inference_service_pb2_grpc as rpc
from lmd.v1 import model_pb2, runtime_service_pb2

KeepAliveRequest = (
    pb.GenerateRequest
    | pb.ChatRequest
    | pb.EmbedRequest
    | pb.RerankRequest
    | pb.TokenizeRequest
    | pb.DetokenizeRequest
    | pb.ApplyTemplateRequest
    | runtime_service_pb2.LoadModelRequest
)
"""The requests that say how long their model stays resident."""


class InferenceServiceServicer(rpc.InferenceServiceServicer):
    """Runs models for the callers of the API."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Continue a prompt."""
        events = self._inference.generate(
            model=request.model,
            prompt=request.prompt,
            system=request.system if request.HasField("system") else None,
            raw=request.raw,
            suffix=request.suffix,
            template=request.template,
            think=think_of(request),
            parameters=requested(request.parameters),
            keep_alive=keep_alive_of(request),
            options=options_of(request.options),
            caller=cache_scope_of(context),
            time_left_s=context.time_remaining(),
        )
        async with aclosing(events):
            async for event in events:
                yield pb.GenerateResponse(**event_fields(event))

    async def Chat(
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext[pb.ChatRequest, pb.ChatResponse]
    ) -> AsyncIterator[pb.ChatResponse]:
        """Answer a chat."""
        events = self._inference.chat(
            model=request.model,
            messages=turns_of(request.messages),
            tools=tools_of(request),
            think=think_of(request),
            parameters=requested(request.parameters),
            keep_alive=keep_alive_of(request),
            options=options_of(request.options),
            caller=cache_scope_of(context),
            time_left_s=context.time_remaining(),
        )
        async with aclosing(events):
            async for event in events:
                yield pb.ChatResponse(**event_fields(event))


def requested(parameters: model_pb2.Parameters) -> dict[str, object]:
    """Return the settings that are set; the fields' names are the registry's."""
    return {field.name: list(value) if field.is_repeated else value for field, value in parameters.ListFields()}


def keep_alive_of(request: KeepAliveRequest) -> timedelta | None:
    """Return how long the model shall stay, None when the request does not say."""
    return request.keep_alive.ToTimedelta() if request.HasField("keep_alive") else None


def cache_scope_of(context: HasPeer) -> str:
    """Return the name of the caller: one for each user, who shares prefixes, the queue and the engine as one."""
    return f"uid:{caller_of(context).uid}"
