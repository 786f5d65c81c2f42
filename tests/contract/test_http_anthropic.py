"""`/v1/messages` as Anthropic's own client uses it, with answers that the tests write themselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import timedelta
from typing import Any

import anthropic
import httpx
import pytest
from pydantic import BaseModel

from lmd.daemon.answer_events import Delta, Started
from lmd.daemon.answer_options import FormatKind
from lmd.daemon.conversations import Think, Tool, ToolCall, ToolChoice, Tools, Turn
from lmd.daemon.errors import ContextLengthExceeded, QueueFull, RunnerCrashed
from lmd.daemon.http.anthropic.errors import render_error
from lmd.daemon.http.anthropic.messages import routes
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import CapabilityMissing, ModelNotFound
from tests.support.answer_streams import done
from tests.support.http_chat import Gateway, served

SCHEMA: dict[str, object] = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Any = {"name": "get_weather", "description": "Tells the weather", "input_schema": SCHEMA}
CALL = ToolCall("call_1", "get_weather", '{"city": "Bern"}')
ASK: Any = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
BEGUN = Started(prompt_tokens=9, cached_tokens=4)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with served(routes, renderers={"/v1/messages/": render_error}) as made:
        yield made


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key="none", max_retries=0) as made:
        yield made


async def test_text(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    gateway.inference.script = [BEGUN, Delta("Hello", 1), Delta(" world", 2), done(generated_tokens=3)]
    message = await client.messages.create(**ASK)
    (block,) = message.content
    assert block.type == "text"
    assert (block.text, message.role, message.model, message.stop_reason) == (
        "Hello world",
        "assistant",
        "m",
        "end_turn",
    )
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (5, 4, 3)
    assert message._request_id is not None
    assert message._request_id.startswith("req_")
    asked = gateway.inference.asked
    assert gateway.inference.turns == [Turn("user", "hi")]
    assert (asked["caller"], asked["parameters"], asked["tools"]) == ("uid:1000", {"num_predict": 50}, None)
    # Who does not ask for thoughts reads the first block as the answer.
    assert asked["think"] == Think.OFF


async def test_sync_client_streams(gateway: Gateway) -> None:
    gateway.inference.script = [
        BEGUN,
        Delta("", 2, thinking="hm"),
        Delta("a", 3),
        Delta("b", 4, tool_calls=(CALL,)),
        done(finish_reason="tool_calls"),
    ]

    def stream() -> tuple[Sequence[str], anthropic.types.Message]:
        with (
            anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0) as client,
            client.messages.stream(**ASK, thinking={"type": "adaptive"}) as events,
        ):
            kinds = [event.type for event in events]
            return kinds, events.get_final_message()

    kinds, message = await asyncio.to_thread(stream)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert (kinds.count("thinking"), kinds.count("text"), kinds.count("input_json")) == (1, 2, 1)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    last = message.content[-1]
    assert last.type == "tool_use"
    assert (last.id, last.name, last.input) == ("call_1", "get_weather", {"city": "Bern"})
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("tool_use", 5, 7)


async def test_size_of_the_prompt_is_told_first(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    gateway.inference.script = [Waiting(1), BEGUN, Delta("a", 1), done()]
    events = [event async for event in await client.messages.create(**ASK, stream=True)]
    first = events[0]
    assert first.type == "message_start"
    usage = first.message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (5, 4, 0)


async def test_tools_are_used_and_answered(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    gateway.inference.script = [
        BEGUN,
        Delta("I will look.", 9, thinking="hm", tool_calls=(CALL,)),
        done(finish_reason="tool_calls"),
    ]
    first = await client.messages.create(**ASK, tools=[TOOL], thinking={"type": "enabled", "budget_tokens": 1024})
    assert gateway.inference.asked["think"] == Think.ON
    (tool,) = gateway.inference.asked["tools"].tools
    assert (tool.name, tool.description, json.loads(tool.parameters)) == ("get_weather", "Tells the weather", SCHEMA)
    result: Any = [
        {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
        {"type": "text", "text": "and now?"},
        {"type": "text", "text": "quick"},
    ]
    gateway.inference.script = [BEGUN, Delta("Rain.", 2), done()]
    history: Any = [
        *ASK["messages"],
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": result},
    ]
    system: Any = [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]
    await client.messages.create(**ASK | {"messages": history}, system=system, tools=[TOOL])
    assert gateway.inference.turns == [
        Turn("system", "be\nbrief"),
        Turn("user", "hi"),
        Turn("assistant", "I will look.", "hm", (CALL,)),
        Turn("tool", "rain", tool_name="get_weather", tool_call_id="call_1"),
        Turn("user", "and now?\nquick"),
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, Tools((Tool("f", "", "{}"),))),
        ({"type": "none"}, Tools((Tool("f", "", "{}"),), ToolChoice.NONE)),
        ({"type": "any"}, Tools((Tool("f", "", "{}"),), ToolChoice.REQUIRED)),
        ({"type": "tool", "name": "f"}, Tools((Tool("f", "", "{}"),), ToolChoice.REQUIRED, "f")),
    ],
)
async def test_choice_of_tools(
    gateway: Gateway, client: anthropic.AsyncAnthropic, choice: Any, expected: Tools
) -> None:
    gateway.inference.script = [BEGUN, done()]
    await client.messages.create(**ASK, tools=[{"name": "f", "input_schema": {}}], tool_choice=choice)
    assert gateway.inference.asked["tools"] == expected


async def test_one_call_at_a_time(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    calls = (CALL, ToolCall("call_2", "get_weather", "{}"))
    gateway.inference.script = [BEGUN, Delta("", 9, tool_calls=calls), done(finish_reason="tool_calls")]
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    message = await client.messages.create(**ASK, tools=[TOOL], tool_choice=choice)
    assert [block.id for block in message.content if block.type == "tool_use"] == ["call_1"]


@pytest.mark.parametrize(
    ("fields", "think"),
    [
        ({}, Think.OFF),
        ({"thinking": {"type": "disabled"}}, Think.OFF),
        ({"thinking": {"type": "adaptive"}}, Think.ON),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, Think.LOW),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}, "output_config": {"effort": "max"}}, Think.HIGH),
    ],
)
async def test_thinking(gateway: Gateway, client: anthropic.AsyncAnthropic, fields: Any, think: Think) -> None:
    gateway.inference.script = [BEGUN, done()]
    await client.messages.create(**ASK, **fields)
    assert gateway.inference.asked["think"] == think


async def test_model_that_cannot_think(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    gateway.inference.script, gateway.inference.thinks = [BEGUN, Delta("so", 1), done()], False
    await client.messages.create(**ASK, thinking={"type": "adaptive"})
    assert gateway.inference.asked["think"] is None
    with pytest.raises(anthropic.BadRequestError, match="does not support thinking"):
        await client.messages.create(**ASK, thinking={"type": "enabled", "budget_tokens": 1024})


class City(BaseModel):
    name: str


async def test_parse(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    gateway.inference.script = [BEGUN, Delta('{"name": "Bern"}', 5), done()]
    message = await client.messages.parse(**ASK, output_format=City)
    assert message.parsed_output == City(name="Bern")
    wanted = gateway.inference.asked["options"].format
    assert wanted.kind == FormatKind.JSON_SCHEMA
    assert json.loads(wanted.text)["properties"]["name"]["type"] == "string"


async def test_settings(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    gateway.inference.script = [BEGUN, done(stop="END")]
    extra = {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 5, "num_ctx": 128, "keep_alive": "90s"}
    message = await client.messages.create(
        **ASK, stop_sequences=["END"], metadata={"user_id": "somebody"}, extra_body=extra
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
    asked = gateway.inference.asked
    assert asked["keep_alive"] == timedelta(seconds=90)
    assert asked["parameters"] == {
        "num_predict": 50,
        "stop": ["END"],
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 5,
        "num_ctx": 128,
    }


async def test_count_tokens(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    gateway.tokenizing.tokens = 42
    counted = await client.messages.count_tokens(model="m", messages=ASK["messages"], system="s", tools=[TOOL])
    assert counted.input_tokens == 42
    asked = gateway.tokenizing.asked
    assert asked["messages"] == [Turn("system", "s"), Turn("user", "hi")]
    assert [tool.name for tool in asked["tools"].tools] == ["get_weather"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"messages\[0\].content\[0\].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "tool_use"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]}, "name"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"keep_alive": "300"}, "keep_alive"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "schema"),
    ],
)
async def test_what_cannot_be_done_is_refused(client: anthropic.AsyncAnthropic, fields: Any, words: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        await client.post("/v1/messages", body=ASK | fields, cast_to=httpx.Response)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": caught.value.api_message},
        "request_id": caught.value.request_id,
    }


async def test_thread_is_refused_so_that_clients_go_on_without(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.types.ThreadUnsupportedRequestError) as caught:
        await client.beta.messages.create(**ASK, thread={"type": "create"})
    assert caught.value.error_code == "thread_unsupported_request"


async def test_errors_are_typed(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    cases: list[tuple[Exception, type[anthropic.APIStatusError], str]] = [
        (ModelNotFound("m"), anthropic.NotFoundError, "not_found_error"),
        (ContextLengthExceeded(prompt_tokens=9, context_tokens=8), anthropic.BadRequestError, "invalid_request_error"),
        (CapabilityMissing("m", "chat"), anthropic.BadRequestError, "invalid_request_error"),
        (QueueFull(limit=1, retry_after_s=3), anthropic.APIStatusError, "overloaded_error"),
        (QueueFull(limit=1, retry_after_s=3, own=True), anthropic.RateLimitError, "rate_limit_error"),
        (RunnerCrashed("m", cause="signal 9", log=""), anthropic.InternalServerError, "api_error"),
        (ZeroDivisionError("secret"), anthropic.InternalServerError, "api_error"),
    ]
    for error, kind, name in cases:
        for streamed in (False, True):
            gateway.inference.script = [Waiting(1), error]
            with pytest.raises(kind) as caught:
                await client.messages.create(**ASK, stream=streamed)
            assert caught.value.type == name
            assert "secret" not in str(caught.value)
            if isinstance(error, QueueFull):
                assert caught.value.response.headers["retry-after"] == "3"
                assert caught.value.status_code == (429 if error.own else 529)
    with pytest.raises(anthropic.NotFoundError):
        await client.get("/v1/messages/batches", cast_to=httpx.Response)
    with pytest.raises(anthropic.APIStatusError) as wrong_verb:
        await client.get("/v1/messages", cast_to=httpx.Response)
    assert (wrong_verb.value.status_code, wrong_verb.value.type) == (405, "invalid_request_error")


async def test_failure_within_a_stream_is_its_last_event(gateway: Gateway, client: anthropic.AsyncAnthropic) -> None:
    gateway.inference.script = [BEGUN, Delta("half", 1), RunnerCrashed("m", cause="signal 9", log="")]
    events: list[str] = []
    stream = await client.messages.create(**ASK, stream=True)

    async def read() -> None:
        async for event in stream:
            events.append(event.type)  # noqa: PERF401 (a comprehension would lose what came before the error)

    with pytest.raises(anthropic.APIStatusError, match=r"died \(signal 9\)") as caught:
        await read()
    assert events == ["message_start", "content_block_start", "content_block_delta"]
    assert caught.value.type == "api_error"
    body: Any = caught.value.body
    assert body["request_id"] == caught.value.request_id
