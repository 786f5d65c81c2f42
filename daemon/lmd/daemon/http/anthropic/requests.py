"""What clients of Anthropic's API send, as far as it is read; other fields are ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

INT32_MAX = 2**31 - 1


def _blocks(value: object) -> object:
    """Read a text where a list of blocks may stand as a list of one."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class _Body(BaseModel):
    """Any part of a body: a number is a number and not text that looks like one."""

    model_config = ConfigDict(strict=True)


class ResultBlock(_Body):
    """A piece of what a tool said."""

    type: str
    text: str | None = None


class Block(_Body):
    """A piece of a message; which fields it needs depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, object] | None = None
    tool_use_id: str | None = None
    content: Annotated[list[ResultBlock] | None, BeforeValidator(_blocks)] = None


class Message(_Body):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_blocks)]


class ToolDefinition(_Body):
    """A tool; those that Anthropic's servers run have other types and are refused."""

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, object] | None = None


class ToolChoice(_Body):
    """Whether, and which, tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(_Body):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(_Body):
    """What the text must look like."""

    model_config = ConfigDict(strict=True)

    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(_Body):
    """How much effort goes into the answer, and its format."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(_Body):
    """The body of `POST /v1/messages/count_tokens`."""

    model: str
    messages: list[Message]
    system: Annotated[list[ResultBlock] | None, BeforeValidator(_blocks)] = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # Beyond the standard.
    keep_alive: float | str | None = None


class MessageRequest(CountRequest):
    """The body of `POST /v1/messages`."""

    max_tokens: int = Field(ge=1, le=INT32_MAX)
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=INT32_MAX)
    # Ignored.
    metadata: object = None
    service_tier: object = None
    # Beyond the standard.
    seed: int | None = None
    num_ctx: int | None = None


REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/messages": MessageRequest,
    "/v1/messages/count_tokens": CountRequest,
}
"""The body of each endpoint, for the table of compatibility."""
