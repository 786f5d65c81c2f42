"""Inference over fake runners, called directly and over the wire; the fixtures are those of the contract tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import grpc.aio

from lmd.daemon.answer_events import Delta, Event
from lmd.daemon.inference import Inference
from lmd.registry.errors import ModelNotFound
from lmd.registry.lm_config import Message
from lmd.registry.store import TagRecord
from lmd.v1 import inference_service_pb2_grpc as rpc
from lmd.v1 import runtime_service_pb2_grpc
from tests.support.residents import Model, World


class Catalog:
    """Stands in for the catalog: the models of a test by name."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}

    async def resolve(self, text: str) -> Model:
        name = text if ":" in text else f"{text}:latest"
        if name not in self.models:
            raise ModelNotFound(text)
        return self.models[name]

    async def find(self, text: str) -> TagRecord:
        model = await self.resolve(text)
        return TagRecord(model.name, model.manifest_digest, 0, 0)

    def add(self, model: Model) -> Model:
        self.models[model.name] = model
        return model


@dataclass
class Bench:
    world: World
    catalog: Catalog
    inference: Inference

    def model(self, name: str = "m", *, system: str | None = None, chat: bool = False, **script: Any) -> Model:
        made = self.world.model(name, **script)
        can = ("completion", "chat") if chat else ("completion",)
        return self.catalog.add(replace(made, system=system, capabilities=can))

    async def generate(self, prompt: str, **options: Any) -> list[Event]:
        return [event async for event in self.inference.generate(model="m", prompt=prompt, **options)]

    async def chat(self, *messages: tuple[str, str], **options: Any) -> list[Event]:
        turns = [Message(role, content) for role, content in messages]
        return [event async for event in self.inference.chat(model="m", messages=turns, **options)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


class Connection:
    """A real server on a loopback port, and a channel to it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.inference = rpc.InferenceServiceStub(channel)
        self.runtime = runtime_service_pb2_grpc.RuntimeServiceStub(channel)
