"""Anthropic's own client sends messages to a real daemon."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import grpc
import pytest
from anthropic import Anthropic
from pydantic import BaseModel, ConfigDict

from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2
from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.chat_models import ENDLESS_CTX, chatting
from tests.support.compatibility import parts, read, response_problems
from tests.support.product import Product, wait_until

pytestmark = pytest.mark.e2e

CITY: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "weather", "description": "The weather", "input_schema": CITY}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with chatting(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("h")) as product:
        yield product


@pytest.fixture(scope="module")
def base_url(daemon: Product) -> str:
    return str(daemon.json("status")["http"])


@pytest.fixture
def client(base_url: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=base_url, api_key="unused", max_retries=0) as made:
        yield made


def ask(model: str, content: Any = "what now", **fields: Any) -> Any:
    return {"model": model, "max_tokens": 64, "messages": [{"role": "user", "content": content}], **fields}


def input_tokens(usage: anthropic.types.Usage) -> int:
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_says_what_grpc_says(daemon: Product, client: Anthropic) -> None:
    parameters = model_pb2.Parameters(temperature=0.0, seed=11, num_predict=24)
    said = (("system", "be kind"), ("user", "the house"))
    messages = [model_pb2.Message(role=role, content=content) for role, content in said]
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        stub = InferenceServiceStub(channel)
        events = list(stub.Chat(pb.ChatRequest(model="chat", messages=messages, parameters=parameters)))
    text, done = "".join(event.delta.text for event in events), events[-1].done
    options = ask("chat", "the house", system="be kind", extra_body={"temperature": 0, "seed": 11}) | {"max_tokens": 24}
    message = client.messages.create(**options)
    assert (text_of(message), message.stop_reason) == (text, "max_tokens")
    assert (input_tokens(message.usage), message.usage.output_tokens) == (done.prompt_tokens, done.generated_tokens)
    # It is the same caller, so the prompt is known but for its last token.
    assert message.usage.cache_read_input_tokens == done.prompt_tokens - 1
    with client.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().usage == message.usage
    counted = client.messages.count_tokens(model="chat", system="be kind", messages=options["messages"])
    assert counted.input_tokens == done.prompt_tokens


def test_stream_begins_with_the_size_of_the_prompt(client: Anthropic) -> None:
    events = list(client.messages.create(**ask("ending"), stream=True))
    first, last = events[0], events[-2]
    assert first.type == "message_start"
    assert last.type == "message_delta"
    counted = client.messages.count_tokens(model="ending", messages=ask("ending")["messages"])
    assert input_tokens(first.message.usage) == counted.input_tokens > 0
    assert (last.delta.stop_reason, last.usage.input_tokens) == ("end_turn", first.message.usage.input_tokens)


def test_stop_sequences(client: Anthropic) -> None:
    message = client.messages.create(**ask("ending", stop_sequences=["nowhere", " three"]))
    assert (text_of(message).strip(), message.stop_reason, message.stop_sequence) == (
        "one two",
        "stop_sequence",
        " three",
    )
    whole = client.messages.create(**ask("ending"))
    assert (text_of(whole).strip(), whole.stop_reason) == ("one two three four", "end_turn")


def test_context_that_is_full_is_told_apart(client: Anthropic) -> None:
    message = client.messages.create(**ask("chat") | {"max_tokens": 4000})
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.output_tokens < 4000


def test_tool_is_used_and_answered(client: Anthropic) -> None:
    first = client.messages.create(**ask("caller", tools=[WEATHER]))
    assert first.stop_reason == "tool_use"
    text, call = first.content
    assert text.type == "text"
    assert text.text == "sure"
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("weather", {"city": "Rome"})
    history: Any = [
        {"role": "user", "content": "what now"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]},
    ]
    second = client.messages.create(**ask("caller", tools=[WEATHER]) | {"messages": history})
    assert input_tokens(second.usage) > input_tokens(first.usage)
    counted = client.messages.count_tokens(model="caller", messages=history, tools=[WEATHER])
    assert counted.input_tokens == input_tokens(second.usage)
    without = client.messages.count_tokens(model="caller", messages=history)
    assert without.input_tokens < counted.input_tokens


def test_tool_runner_sends_whole_conversations(client: Anthropic) -> None:
    """It would rather have the conversation held by the server, and is told that this one does not."""
    asked: list[str] = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Tell the weather."""
        asked.append(city)
        return "rain"

    messages: Any = [{"role": "user", "content": "what now"}]
    runner = client.beta.messages.tool_runner(
        model="caller", max_tokens=64, tools=[weather], messages=messages, max_iterations=3
    )
    sizes = [reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0) for reply in runner]
    # The model does nothing but call.
    assert asked[:2] == ["Rome", "Rome"]
    assert len(sizes) == 3
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tool_that_must_be_used_is_used(client: Anthropic, choice: Any) -> None:
    """The model is random: only the grammar makes it call."""
    options = ask("random", tools=[WEATHER], tool_choice=choice, extra_body={"seed": 5}) | {"max_tokens": 2000}
    with client.messages.stream(**options) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    calls = [block for block in message.content if block.type == "tool_use"]
    assert calls
    assert message.stop_reason == "tool_use"
    assert all(call.input["city"] in ("Rome", "Oslo") for call in calls)
    assert [json.loads(piece) for piece in pieces] == [call.input for call in calls]


def test_thoughts_come_to_who_asks(client: Anthropic) -> None:
    message = client.messages.create(**ask("thinker", thinking={"type": "adaptive"}))
    thoughts, text = message.content
    assert thoughts.type == "thinking"
    assert thoughts.thinking == "maybe yes"
    assert text.type == "text"
    assert text.text == "sure one"
    details = message.usage.output_tokens_details
    assert details is not None
    assert 0 < details.thinking_tokens < message.usage.output_tokens
    with client.messages.stream(**ask("thinker", thinking={"type": "enabled", "budget_tokens": 1024})) as stream:
        assert "".join(event.thinking for event in stream if event.type == "thinking") == "maybe yes"
    # Those who ask for thoughts whatever the model is get what there is; those who insist are told.
    assert text_of(client.messages.create(**ask("ending", thinking={"type": "adaptive"})))
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        client.messages.create(**ask("ending", thinking={"type": "enabled", "budget_tokens": 1024}))


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mood: Literal["happy", "sad"]


def test_schema_through_the_parse_helper(client: Anthropic) -> None:
    message = client.messages.parse(**ask("chat", "how are you"), output_format=Answer)
    assert message.parsed_output is not None
    assert message.parsed_output.mood in ("happy", "sad")


def test_async_client(base_url: str) -> None:
    async def both() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=base_url, api_key="unused", max_retries=0) as client:
            whole = await client.messages.create(**ask("ending"))
            async with client.messages.stream(**ask("ending")) as stream:
                return text_of(whole), await stream.get_final_text()

    whole, streamed = asyncio.run(both())
    assert whole == streamed
    assert whole.strip() == "one two three four"


def test_errors_are_typed(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**ask("nobody"))
    assert missing.value.type == "not_found_error"
    assert missing.value.request_id is not None
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="nobody", messages=ask("nobody")["messages"])
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError) as long:
            client.messages.create(**ask("chat", "the " * 600), stream=stream)
        assert long.value.type == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(**ask("chat", [{"type": "image", "source": {"type": "url", "url": "x"}}]))


def test_fields_of_answers_are_in_the_table(client: Anthropic) -> None:
    rows = read(parts()).rows
    for model, fields in (("caller", {"tools": [WEATHER]}), ("thinker", {"thinking": {"type": "adaptive"}})):
        body: Any = ask(model, **fields)
        answer = client.messages.with_raw_response.create(**body).http_response.json()
        assert len(answer["content"]) == 2
        assert not list(response_problems(rows, "POST /v1/messages", answer))


def test_client_that_leaves_frees_its_slots(daemon: Product, client: Anthropic, base_url: str) -> None:
    endless = ask("endless") | {"max_tokens": ENDLESS_CTX}
    body = json.dumps(endless | {"num_ctx": ENDLESS_CTX})

    def busy() -> int:
        return sum(int(r["slots_busy"] + r["queued"]) for r in daemon.json("ps") if r["name"] == "endless:latest")

    stream = client.messages.create(**endless, stream=True, extra_body={"num_ctx": ENDLESS_CTX})
    whole = subprocess.Popen(["curl", "-s", f"{base_url}/v1/messages", "-d", body], stdout=subprocess.DEVNULL)
    wait_until(lambda: busy() == 2, "both are answered")
    stream.close()
    whole.kill()
    whole.wait()
    wait_until(lambda: busy() == 0, "nothing is busy for clients that left")


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"", 400, "invalid_request_error"),
        (b"{", 400, "invalid_request_error"),
        (b'{"model": "chat", "max_tokens": 1, "messages": "\xff"}', 400, "invalid_request_error"),
        (b'{"model": "chat", "model": "chat"}', 400, "invalid_request_error"),
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "invalid_request_error"),
        (b"[]", 400, "invalid_request_error"),
        (b"{}", 400, "invalid_request_error"),
        (
            b'{"model": "", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}',
            400,
            "invalid_request_error",
        ),
        (b'{"model": "no", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}', 404, "not_found_error"),
    ],
)
def test_bad_bodies_with_curl(base_url: str, body: bytes, status: int, kind: str) -> None:
    for path in ("messages", "messages/count_tokens"):
        command = ["curl", "-s", "-w", "\n%{http_code}", f"{base_url}/v1/{path}", "--data-binary", "@-"]
        output = subprocess.run(command, input=body, capture_output=True, check=True).stdout.decode()
        text, _, code = output.rpartition("\n")
        assert int(code) == status, text
        error = json.loads(text)
        assert (error["type"], error["error"]["type"]) == ("error", kind)
        assert error["error"]["message"]
        assert error["request_id"].startswith("req_")
