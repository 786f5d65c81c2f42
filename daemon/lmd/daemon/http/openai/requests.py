"""What clients of OpenAI's API send: the bodies, and nothing of what they mean.

Fields that no model here knows are ignored, as clients are ahead of servers. Those that are named and do nothing are
under "ignored" in the classes; what would change the answer, and cannot be done, is refused where it is translated.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

#: OpenAI takes up to 128 choices; the engine serves 16 at once.
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 256

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Body(BaseModel):
    """Any part of a body: a number is a number and not text that looks like one."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Extras(Body):
    """What requests take beyond OpenAI's fields; those that are settings of the registry have its names."""

    keep_alive: float | str | None = None
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    use_mmap: bool | None = None
    kv_type: str | None = None
    truncate: bool | None = None


class Sampling(Extras):
    """The settings that chats and completions share."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    # Beyond OpenAI's.
    grammar: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    ignore_eos: bool | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    draft_num_predict: int | None = None
    prompt_lookup: bool | None = None
    deterministic: bool | None = None
    context_policy: Literal["error", "truncate", "shift"] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    priority: Literal["interactive", "batch"] | None = None
    timeout: float | str | None = None
    adapters: dict[str, float] | None = None


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None


class FunctionCall(Body):
    """A call that the assistant made; *arguments* is JSON as text."""

    name: str
    arguments: str = ""


class ToolCall(Body):
    """A call with the id that its result is matched by."""

    id: str = ""
    type: str | None = None
    function: FunctionCall | None = None


class Part(Body):
    """A part of a message; only text can be read."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(Body):
    """One turn."""

    role: str
    content: str | list[Part] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class FunctionTool(Body):
    """A function that a model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ChatTool(Body):
    """A tool; only functions can be called."""

    type: str
    function: FunctionTool | None = None


class NamedFunction(Body):
    """The function that must be called."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: str
    function: NamedFunction | None = None


class JsonSchema(Body):
    """A schema with a name."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    name: str | None = None
    description: str | None = None
    # The base class has a method of the field's own name.
    json_schema: dict[str, object] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must look like; *schema* beside `json_object` is llama-server's."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    type: str
    json_schema: JsonSchema | None = None
    object_schema: dict[str, object] | None = Field(None, alias="schema")


class Reasoning(Body):
    """How much to think, as some routers send it."""

    effort: Effort | None = None


class TemplateArguments(Body):
    """What other servers hand to the template."""

    enable_thinking: bool | None = None


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    model: str
    messages: list[ChatMessage]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[ChatTool] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateArguments | None = None
    # Refused when they ask for something.
    functions: list[object] | None = None
    function_call: object = None
    modalities: list[str] | None = None
    audio: object = None
    web_search_options: object = None
    # Ignored.
    user: object = None
    metadata: object = None
    moderation: object = None
    prediction: object = None
    prompt_cache_key: object = None
    prompt_cache_options: object = None
    prompt_cache_retention: object = None
    safety_identifier: object = None
    service_tier: object = None
    store: object = None
    verbosity: object = None


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    model: str
    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    # Refused when it asks for something.
    best_of: int | None = None
    # Ignored.
    user: object = None


class EmbeddingRequest(Extras):
    """`POST /v1/embeddings`."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    # Ignored.
    user: object = None


REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
}
"""The body of each endpoint that takes one."""
