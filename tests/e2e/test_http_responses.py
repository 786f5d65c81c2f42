"""OpenAI's own client asks a real daemon for responses."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any, Literal

import grpc
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2
from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.chat_models import ENDLESS_CTX, chatting
from tests.support.compatibility import parts, read, response_problems
from tests.support.product import Product, wait_until

pytestmark = pytest.mark.e2e

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "description": "The weather", "parameters": CITY}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with chatting(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("h")) as product:
        yield product


@pytest.fixture(scope="module")
def base_url(daemon: Product) -> str:
    return f"{daemon.json('status')['http']}/v1"


@pytest.fixture
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key="unused", max_retries=0) as made:
        yield made


def test_says_what_grpc_says(daemon: Product, client: OpenAI) -> None:
    parameters = model_pb2.Parameters(temperature=0.0, seed=11, num_predict=24)
    messages = [
        model_pb2.Message(role="system", content="be kind"),
        model_pb2.Message(role="user", content="the house"),
    ]
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        stub = InferenceServiceStub(channel)
        events = list(stub.Chat(pb.ChatRequest(model="chat", messages=messages, parameters=parameters)))
    text, done = "".join(event.delta.text for event in events), events[-1].done
    options: dict[str, Any] = {"temperature": 0, "max_output_tokens": 24, "extra_body": {"seed": 11}}
    response = client.responses.create(model="chat", instructions="be kind", input="the house", **options)
    assert response.output_text == text
    assert (response.status, response.output[0].status) == ("incomplete", "incomplete")
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (done.prompt_tokens, done.generated_tokens)
    # It is the same caller, so the prompt is known but for its last token.
    assert usage.input_tokens_details.cached_tokens == done.prompt_tokens - 1
    with client.responses.stream(model="chat", instructions="be kind", input="the house", **options) as stream:
        streamed = list(stream)
    assert "".join(event.delta for event in streamed if event.type == "response.output_text.delta") == text
    last = streamed[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == text


def test_model_ends_by_itself(client: OpenAI) -> None:
    response = client.responses.create(model="ending", input="say")
    assert (response.output_text.strip(), response.status) == ("one two three four", "completed")


def test_conversation_goes_on(client: OpenAI) -> None:
    first = client.responses.create(model="ending", input="say")
    items: Any = [{"role": "user", "content": "say"}, *(item.to_dict() for item in first.output)]
    again = client.responses.create(model="ending", input=[*items, {"role": "user", "content": "go"}])
    assert again.usage is not None
    assert first.usage is not None
    assert again.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


def test_function_is_called_and_answered(client: OpenAI) -> None:
    first = client.responses.create(model="caller", input="what now", tools=[WEATHER])
    message, call = first.output
    assert message.type == "message"
    assert first.output_text == "sure"
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
    history: Any = [
        {"role": "user", "content": "what now"},
        *(item.to_dict() for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    second = client.responses.create(model="caller", input=history, tools=[WEATHER])
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_call_that_must_be_made_is_made(client: OpenAI, choice: Any) -> None:
    """The model is random: only the grammar makes it call."""
    options: Any = {"tools": [WEATHER], "tool_choice": choice, "extra_body": {"seed": 5}}
    with client.responses.stream(model="random", input="what now", **options) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        calls = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert calls
    assert "".join(deltas) == "".join(call.arguments for call in calls)
    assert all(json.loads(call.arguments)["city"] in ("Rome", "Oslo") for call in calls)


def test_thoughts_are_items_of_their_own(client: OpenAI) -> None:
    response = client.responses.create(model="thinker", input="what now", reasoning={"effort": "medium"})
    thoughts, message = response.output
    assert thoughts.type == "reasoning"
    assert [part.text for part in thoughts.summary] == ["maybe yes"]
    assert message.type == "message"
    assert response.output_text == "sure one"
    assert response.usage is not None
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    kinds = [event.type for event in client.responses.create(model="thinker", input="what now", stream=True)]
    assert kinds.index("response.reasoning_summary_text.delta") < kinds.index("response.output_text.delta")


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mood: Literal["happy", "sad"]


def test_schema_through_the_parse_helper(client: OpenAI) -> None:
    response = client.responses.parse(model="chat", input="how are you", text_format=Answer)
    assert response.output_parsed is not None
    assert response.output_parsed.mood in ("happy", "sad")


def test_async_client(base_url: str) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
            whole = await client.responses.create(model="ending", input="say")
            events = [event async for event in await client.responses.create(model="ending", input="say", stream=True)]
            last = events[-1]
            assert last.type == "response.completed"
            return whole.output_text, last.response.output_text

    whole, streamed = asyncio.run(both())
    assert whole == streamed
    assert whole.strip() == "one two three four"


def test_errors_are_typed(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="nobody", input="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            client.responses.create(model="chat", input="the " * 600, stream=stream)
        assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as state:
        client.responses.create(model="chat", input="x", previous_response_id="resp_1")
    assert state.value.param == "previous_response_id"


def test_fields_of_answers_are_in_the_table(client: OpenAI) -> None:
    rows = read(parts()).rows
    for fields in (
        {"model": "caller", "tools": [WEATHER]},
        {"model": "thinker", "reasoning": {"effort": "high"}},
        {"model": "chat", "max_output_tokens": 3, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    ):
        body: Any = {"input": "what now", **fields}
        answer = client.responses.with_raw_response.create(**body).http_response.json()
        assert not list(response_problems(rows, "POST /v1/responses", answer))
        assert len(answer["output"]) == (1 if fields["model"] == "chat" else 2)


def test_truncation_drops_the_oldest_turns_and_says_so(client: OpenAI) -> None:
    old: Any = [{"role": "user", "content": "the " * 300}, {"role": "assistant", "content": "of " * 200}]
    reply = client.responses.with_raw_response.create(
        model="chat", input=[*old, {"role": "user", "content": "and"}], truncation="auto", max_output_tokens=4
    )
    assert int(reply.headers["x-lmd-dropped-messages"]) >= 1
    assert reply.parse().truncation == "auto"


def test_client_that_leaves_frees_its_slots(daemon: Product, client: OpenAI, base_url: str) -> None:
    body = json.dumps({"model": "endless", "input": "x", "num_ctx": ENDLESS_CTX})

    def busy() -> int:
        return sum(int(r["slots_busy"] + r["queued"]) for r in daemon.json("ps") if r["name"] == "endless:latest")

    stream = client.responses.create(model="endless", input="x", stream=True, extra_body={"num_ctx": ENDLESS_CTX})
    whole = subprocess.Popen(["curl", "-s", f"{base_url}/responses", "-d", body], stdout=subprocess.DEVNULL)
    wait_until(lambda: busy() == 2, "both are answered")
    stream.close()
    whole.kill()
    whole.wait()
    wait_until(lambda: busy() == 0, "nothing is busy for clients that left")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"model": "chat", "input": "\xff"}', 400),
        (b'{"model": "chat", "model": "chat", "input": "x"}', 400),
        (b'{"model": "chat", "input": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
        (b"[]", 400),
        (b'{"input": "x"}', 400),
        (b'{"model": "chat"}', 400),
        (b'{"model": "", "input": "x"}', 400),
        (b'{"model": "chat", "input": []}', 400),
    ],
)
def test_bad_bodies_with_curl(base_url: str, body: bytes, status: int) -> None:
    command = ["curl", "-s", "-w", "\n%{http_code}", f"{base_url}/responses", "--data-binary", "@-"]
    output = subprocess.run(command, input=body, capture_output=True, check=True).stdout.decode()
    text, _, code = output.rpartition("\n")
    assert int(code) == status
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
