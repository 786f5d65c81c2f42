"""`/v1/responses` as OpenAI's own client uses it, with answers that the tests write themselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from lmd.daemon.answer_events import Delta
from lmd.daemon.answer_options import ContextPolicy, FormatKind
from lmd.daemon.conversations import Think, Tool, ToolCall, ToolChoice, Tools, Turn
from lmd.daemon.errors import ContextLengthExceeded, DeviceMemoryShort, QueueFull, RunnerCrashed
from lmd.daemon.http.openai.errors import render_error
from lmd.daemon.http.openai.responses import routes
from lmd.daemon.quantities import FOR_EVER
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import ModelNotFound
from tests.support.answer_streams import done
from tests.support.http_chat import Gateway, served
from tests.support.leaks import until

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather",
    "parameters": SCHEMA,
    "strict": False,
}
CALL = ToolCall("call_1", "get_weather", '{"city": "Bern"}')


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with served(routes, renderers={"/v1/": render_error}) as made:
        yield made


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_text(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.inference.script = [Delta("Hello", 1), Delta(" world", 2), done(generated_tokens=3)]
    response = await client.responses.create(model="m", input="hi")
    assert (response.output_text, response.status, response.model) == ("Hello world", "completed", "m")
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens) == (9, 4, 3)
    asked = gateway.inference.asked
    assert gateway.inference.turns == [Turn("user", "hi")]
    assert (asked["caller"], asked["parameters"], asked["tools"], asked["think"]) == ("uid:1000", {}, None, None)
    assert asked["options"].context_policy == ContextPolicy.ERROR


async def test_sync_client_streams(gateway: Gateway) -> None:
    gateway.inference.script = [Delta("", 2, thinking="hm"), Delta("a", 3), Delta("b", 4), done()]

    def stream() -> tuple[list[str], str]:
        with (
            openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
            client.responses.stream(model="m", input="hi") as events,
        ):
            kinds = [event.type for event in events]
            return kinds, events.get_final_response().output_text

    kinds, text = await asyncio.to_thread(stream)
    assert text == "ab"
    assert (kinds[0], kinds[-1], kinds.count("response.output_text.delta")) == (
        "response.created",
        "response.completed",
        2,
    )


async def test_functions_are_called_and_answered(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.inference.script = [Delta("", 9, tool_calls=(CALL,)), done(finish_reason="tool_calls")]
    first = await client.responses.create(model="m", input="weather?", tools=[TOOL], tool_choice="required")
    (called,) = first.output
    assert called.type == "function_call"
    assert (called.call_id, called.name, called.arguments) == ("call_1", "get_weather", '{"city": "Bern"}')
    tools = gateway.inference.asked["tools"]
    assert (tools.choice, tools.only) == (ToolChoice.REQUIRED, "")
    (tool,) = tools.tools
    assert (tool.name, tool.description, json.loads(tool.parameters)) == ("get_weather", "Tells the weather", SCHEMA)

    gateway.inference.script = [Delta("Rain.", 2), done()]
    history: Any = [
        {"role": "user", "content": "weather?"},
        *(item.model_dump() for item in first.output),
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
    ]
    second = await client.responses.create(model="m", input=history, tools=[TOOL])
    assert second.output_text == "Rain."
    assert gateway.inference.turns == [
        Turn("user", "weather?"),
        Turn("assistant", "", tool_calls=(CALL,)),
        Turn("tool", "rain", tool_name="get_weather", tool_call_id="call_1"),
    ]


async def test_what_a_model_put_out_in_one_go_is_one_turn(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    other = ToolCall("call_2", "get_weather", "{}")
    gateway.inference.script = [
        Delta("I will look.", 9, thinking="hm", tool_calls=(CALL, other)),
        done(finish_reason="tool_calls"),
    ]
    first = await client.responses.create(model="m", input="weather?", tools=[TOOL])
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
    gateway.inference.script = [done()]
    history: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        *(item.model_dump() for item in first.output),
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "sun"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sun."}]},
        {"type": "message", "role": "assistant", "content": "And rain."},
        {"role": "user", "content": ""},
    ]
    await client.responses.create(model="m", instructions="speak German", input=history)
    assert gateway.inference.turns == [
        Turn("system", "speak German\n\nbe brief"),
        Turn("user", "a\nb"),
        Turn("assistant", "I will look.", "hm", (CALL, other)),
        Turn("tool", "sun", tool_name="get_weather", tool_call_id="call_2"),
        Turn("assistant", "Sun."),
        Turn("assistant", "And rain."),
        Turn("user", ""),
    ]


async def test_one_call_at_a_time(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    calls = (CALL, ToolCall("call_2", "get_weather", "{}"))
    gateway.inference.script = [Delta("", 9, tool_calls=calls), done(finish_reason="tool_calls")]
    response = await client.responses.create(model="m", input="x", tools=[TOOL], parallel_tool_calls=False)
    assert [item.call_id for item in response.output if item.type == "function_call"] == ["call_1"]


class City(BaseModel):
    name: str


async def test_parse(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.inference.script = [Delta('{"name": "Bern"}', 5), done()]
    response = await client.responses.parse(model="m", input="which?", text_format=City)
    assert response.output_parsed == City(name="Bern")
    wanted = gateway.inference.asked["options"].format
    assert wanted.kind == FormatKind.JSON_SCHEMA
    assert json.loads(wanted.text)["properties"]["name"]["type"] == "string"


async def test_settings(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.inference.script = [done()]
    await client.responses.create(
        model="m",
        input="x",
        temperature=0,
        top_p=0.5,
        max_output_tokens=7,
        truncation="auto",
        reasoning={"effort": "low", "summary": "auto"},
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        top_logprobs=2,
        store=True,
        tools=[TOOL, {**TOOL, "name": "other"}],
        tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]},
        extra_body={"num_ctx": 128, "seed": 5, "keep_alive": -1, "grammar": 'root ::= "a"'},
    )
    asked = gateway.inference.asked
    assert asked["parameters"] == {"temperature": 0, "top_p": 0.5, "num_predict": 7, "seed": 5, "num_ctx": 128}
    assert (asked["think"], asked["keep_alive"]) == (Think.LOW, FOR_EVER)
    options = asked["options"]
    assert (options.context_policy, options.top_logprobs) == (ContextPolicy.TRUNCATE, 2)
    assert options.format.text == 'root ::= "a"'
    tools = asked["tools"]
    assert ([tool.name for tool in tools.tools], tools.choice) == (["other"], ToolChoice.REQUIRED)
    await client.responses.create(model="m", input="x", extra_body={"keep_alive": "90s"})
    assert gateway.inference.asked["keep_alive"] == timedelta(seconds=90)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", Tools((Tool("f"),), ToolChoice.NONE)),
        ("auto", Tools((Tool("f"),))),
        ({"type": "function", "name": "f"}, Tools((Tool("f"),), ToolChoice.REQUIRED, "f")),
    ],
)
async def test_choice_of_tools(gateway: Gateway, client: openai.AsyncOpenAI, choice: Any, expected: Tools) -> None:
    gateway.inference.script = [done()]
    tool: Any = {"type": "function", "name": "f"}
    await client.responses.create(model="m", input="x", tools=[tool], tool_choice=choice)
    assert gateway.inference.asked["tools"] == expected


async def test_effort_is_no_error_where_a_model_cannot_think(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.inference.script, gateway.inference.thinks = [Delta("so", 1), done()], False
    response = await client.responses.create(model="m", input="x", reasoning={"effort": "high"})
    assert response.output_text == "so"
    assert gateway.inference.asked["think"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"input": 5}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]}, "input[0].arguments"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "f"}]}}, "tool_choice.tools"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_object"}}, "grammar": "x"}, "grammar"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"keep_alive": "300"}, "keep_alive"),
        ({"reasoning": {"effort": "very"}}, "reasoning.effort"),
        ({"truncation": "maybe"}, "truncation"),
    ],
)
async def test_what_cannot_be_done_is_refused(client: openai.AsyncOpenAI, fields: dict[str, Any], param: str) -> None:
    body = {"model": "m", "input": "x", **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post("/responses", body=body, cast_to=httpx.Response)
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)


async def test_errors_are_typed(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    for streamed in (False, True):
        gateway.inference.script = [ModelNotFound("m")]
        with pytest.raises(openai.NotFoundError, match="model `m` not found") as caught:
            await client.responses.create(model="m", input="x", stream=streamed)
        assert caught.value.code == "model_not_found"
        gateway.inference.script = [ContextLengthExceeded(prompt_tokens=9, context_tokens=8)]
        with pytest.raises(openai.BadRequestError) as bad:
            await client.responses.create(model="m", input="x", stream=streamed)
        assert bad.value.code == "context_length_exceeded"
        gateway.inference.script = [QueueFull(limit=1, retry_after_s=3)]
        with pytest.raises(openai.InternalServerError) as full:
            await client.responses.create(model="m", input="x", stream=streamed)
        assert (full.value.status_code, full.value.response.headers["retry-after"]) == (503, "3")
        # A model that has to be loaded first and does not fit: the load began, and yet the status is the real one.
        gateway.inference.script = [
            Waiting(1),
            DeviceMemoryShort("m", needed_bytes=2, free_bytes=1, device="cpu"),
        ]
        with pytest.raises(openai.InternalServerError) as short:
            await client.responses.create(model="m", input="x", stream=streamed)
        assert short.value.status_code == 503


async def test_failure_within_a_stream_is_its_last_event(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.inference.script = [Delta("half", 1), RunnerCrashed("m", cause="signal 9", log="")]
    events = [event async for event in await client.responses.create(model="m", input="x", stream=True)]
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert "died (signal 9)" in last.response.error.message
    assert last.response.output_text == "half"


async def test_defect_within_a_stream_says_nothing_of_its_inside(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.inference.script = [Delta("half", 1), ZeroDivisionError("secret")]
    events = [event async for event in await client.responses.create(model="m", input="x", stream=True)]
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "error_id" in last.response.error.message
    assert "secret" not in last.response.error.message


async def test_frames_have_names(gateway: Gateway) -> None:
    gateway.inference.script = [Delta("a\u2028b", 1), done()]
    async with httpx.AsyncClient() as http:
        reply = await http.post(f"{gateway.url}/v1/responses", json={"model": "m", "input": "x", "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    frames = reply.text.removesuffix("\n\n").split("\n\n")
    for frame in frames:
        name, data = frame.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


async def test_answer_stops_when_the_client_leaves(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    never = asyncio.Event()
    gateway.inference.script = [Delta("a", 1), never]
    stream = await client.responses.create(model="m", input="x", stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    assert gateway.inference.open_streams == 1
    await stream.close()
    await until(lambda: gateway.inference.open_streams == 0)


async def test_what_was_reused_and_dropped_is_in_the_headers(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.inference.script = [Waiting(2), Delta("a", 1), done(dropped_messages=3, dropped_tokens=40)]
    reply = await client.responses.with_raw_response.create(model="m", input="x")
    shown = {name: value for name, value in reply.headers.items() if name.startswith("x-lmd-")}
    assert shown == {
        "x-lmd-prompt-tokens-cached": "4",
        "x-lmd-dropped-messages": "3",
        "x-lmd-dropped-tokens": "40",
        "x-lmd-queue-position": "2",
    }
