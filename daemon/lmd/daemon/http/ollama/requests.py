"""The bodies of Ollama's requests that run models.

Kinds are checked as Ollama checks them: a number is no text, and null is as good as nothing. What Ollama takes in
several kinds is an `object` here, and read in `lmd.daemon.http.ollama.wishes`. Unknown fields are ignored.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Body(BaseModel):
    """What all requests have in common."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class RunBody(Body):
    """A request that a model answers, or that loads one."""

    model: str | None = None
    keep_alive: object = None
    options: dict[str, object] | None = None


class AnswerBody(RunBody):
    """A request for an answer."""

    stream: bool | None = None
    format: object = None
    think: object = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    debug_render_only: bool | None = Field(default=None, alias="_debug_render_only")


class GenerateBody(AnswerBody):
    """Body of `POST /api/generate`."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class FunctionCall(Body):
    """A function that was called; `arguments` is an object, not text."""

    index: int | None = None
    name: str | None = None
    arguments: dict[str, object] | None = None


class MessageToolCall(Body):
    """A call in a message of the assistant."""

    id: str | None = None
    function: FunctionCall | None = None


class ChatMessage(Body):
    """A turn of a chat."""

    role: Annotated[str, AfterValidator(str.lower)]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ToolFunction(Body):
    """A function that the model may call; `parameters` is a JSON Schema."""

    name: str | None = None
    description: str | None = None
    parameters: dict[str, object] | None = None


class ToolBody(Body):
    """A tool: always a function."""

    type: str | None = None
    function: ToolFunction | None = None


class ChatBody(AnswerBody):
    """Body of `POST /api/chat`."""

    messages: list[ChatMessage] | None = None
    tools: list[ToolBody] | None = None


class EmbedBody(RunBody):
    """Body of `POST /api/embed`."""

    input: object = None
    truncate: bool | None = None
    dimensions: int | None = None


class EmbeddingsBody(RunBody):
    """Body of `POST /api/embeddings`."""

    prompt: str | None = None


REQUESTS: dict[str, type[BaseModel]] = {
    "/api/generate": GenerateBody,
    "/api/chat": ChatBody,
    "/api/embed": EmbedBody,
    "/api/embeddings": EmbeddingsBody,
}
