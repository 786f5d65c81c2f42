"""InferenceService: translates messages; the behaviour is in `lmd.daemon.inference`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from lmd.daemon.callers import HasPeer, caller_of
from lmd.daemon.inference import Delta, Done, Inference
from lmd.daemon.residency.values import Waiting
from lmd.registry.lm_config import Message
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import inference_service_pb2_grpc as rpc
from lmd.v1 import model_pb2, runtime_service_pb2

_REASONS = {
    "stop": pb.AnswerDone.FINISH_REASON_STOP,
    "length": pb.AnswerDone.FINISH_REASON_LENGTH,
}


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
            parameters=requested(request.parameters),
            keep_alive=keep_alive_of(request),
            cache_scope=cache_scope_of(context),
        )
        async with aclosing(events):
            async for event in events:
                match event:
                    case Delta(text, tokens):
                        yield pb.GenerateResponse(delta=pb.TextDelta(text=text, generated_tokens=tokens))
                    case Waiting():
                        yield pb.GenerateResponse(waiting=_waiting(event))
                    case Done():
                        yield pb.GenerateResponse(done=_done(event))

    async def Chat(
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext[pb.ChatRequest, pb.ChatResponse]
    ) -> AsyncIterator[pb.ChatResponse]:
        """Answer a chat."""
        events = self._inference.chat(
            model=request.model,
            messages=[Message(message.role, message.content) for message in request.messages],
            parameters=requested(request.parameters),
            keep_alive=keep_alive_of(request),
            cache_scope=cache_scope_of(context),
        )
        async with aclosing(events):
            async for event in events:
                match event:
                    case Delta(text, tokens):
                        yield pb.ChatResponse(delta=pb.TextDelta(text=text, generated_tokens=tokens))
                    case Waiting():
                        yield pb.ChatResponse(waiting=_waiting(event))
                    case Done():
                        yield pb.ChatResponse(done=_done(event))


def requested(parameters: model_pb2.Parameters) -> dict[str, object]:
    """Return the settings that are set; the fields' names are the registry's."""
    return {
        field.name: value if isinstance(value, int | float) else list(value) for field, value in parameters.ListFields()
    }


def keep_alive_of(
    request: pb.GenerateRequest | pb.ChatRequest | runtime_service_pb2.LoadModelRequest,
) -> timedelta | None:
    """Return how long the model shall stay, None when the request does not say."""
    return request.keep_alive.ToTimedelta() if request.HasField("keep_alive") else None


def cache_scope_of(context: HasPeer) -> str:
    """Return the scope of the prefix cache: one for each user."""
    return f"uid:{caller_of(context).uid}"


def load_progress(waiting: Waiting) -> runtime_service_pb2.LoadProgress:
    """Return how far the load is that *waiting* tells of."""
    return runtime_service_pb2.LoadProgress(fraction=waiting.load_fraction or 0.0, detail=waiting.detail)


def duration(nanoseconds: int) -> Duration:
    """Return a duration."""
    message = Duration()
    message.FromNanoseconds(nanoseconds)
    return message


def _waiting(waiting: Waiting) -> pb.Waiting:
    message = pb.Waiting(queue_position=waiting.queue_position)
    if waiting.load_fraction is not None or waiting.detail:
        message.load.CopyFrom(load_progress(waiting))
    return message


def _done(done: Done) -> pb.AnswerDone:
    return pb.AnswerDone(
        finish_reason=_REASONS[done.finish_reason],
        prompt_tokens=done.prompt_tokens,
        cached_tokens=done.cached_tokens,
        generated_tokens=done.generated_tokens,
        total_duration=duration(done.total_ns),
        load_duration=duration(done.load_ns),
        queue_duration=duration(done.queue_ns),
        prompt_duration=duration(done.prompt_ns),
        generate_duration=duration(done.generate_ns),
        seed=done.seed,
        stop=done.stop,
    )
