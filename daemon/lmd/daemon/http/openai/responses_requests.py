"""What clients send to `/v1/responses`, as far as it is read; other fields are ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

INT32_MAX = 2**31 - 1
#: The choices that are a word; the others are objects.
TOOL_CHOICES = ("none", "auto", "required")


def _list_of_one(kind: str) -> BeforeValidator:
    """Read a text where a list may stand as a list of one part."""

    def listed(value: object) -> object:
        return [{"type": kind, "text": value}] if isinstance(value, str) else value

    return BeforeValidator(listed)


def _input_items(value: object) -> object:
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


class Part(BaseModel):
    """A piece of what a message or a function says."""

    model_config = ConfigDict(strict=True)

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(BaseModel):
    """One item of the input; which fields it needs depends on its type."""

    model_config = ConfigDict(strict=True)

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Annotated[list[Part] | None, _list_of_one("input_text")] = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Annotated[list[Part] | None, _list_of_one("input_text")] = None
    summary: list[Part] | None = None


class FunctionTool(BaseModel):
    """A tool; only functions can be called."""

    model_config = ConfigDict(strict=True)

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class AllowedTool(BaseModel):
    """A tool of those in `tools`, by name."""

    model_config = ConfigDict(strict=True)

    type: str
    name: str | None = None


class ToolChoiceObject(BaseModel):
    """A choice that is more than a word: one function, or some of them."""

    model_config = ConfigDict(strict=True)

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[AllowedTool] | None = None


def _choice(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


class Reasoning(BaseModel):
    """Whether and how hard the model thinks."""

    model_config = ConfigDict(strict=True)

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(BaseModel):
    """What the text must look like."""

    model_config = ConfigDict(strict=True, serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, object] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(BaseModel):
    """What is asked of the text."""

    model_config = ConfigDict(strict=True)

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseRequest(BaseModel):
    """The body of `POST /v1/responses`."""

    model_config = ConfigDict(strict=True)

    model: str
    input: Annotated[list[Item], BeforeValidator(_input_items)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Annotated[ToolChoiceObject | None, BeforeValidator(_choice)] = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    max_tool_calls: int | None = None
    store: bool | None = None
    # What needs a memory of past responses, which is not kept; read only to be refused.
    previous_response_id: str | None = None
    conversation: str | dict[str, object] | None = None
    background: bool | None = None
    prompt: dict[str, object] | None = None
    # Beyond the standard.
    seed: int | None = None
    num_ctx: int | None = None
    keep_alive: float | str | None = None
    grammar: str | None = None


REQUESTS: dict[str, type[BaseModel]] = {"/v1/responses": ResponseRequest}
"""The body of each endpoint, for the table of compatibility."""
