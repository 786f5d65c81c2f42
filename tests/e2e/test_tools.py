"""Functions, thoughts and gaps, through the installed product over gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2
from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.families import HERMES, OPENED, THINKING
from tests.support.product import Product
from tests.support.tiny_models import make_scripted_llama, make_tiny_llama

pytestmark = pytest.mark.e2e

CALL = '\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
THINKS = ["<think>", "maybe", "</think>", "sure. ", "<tool_call>", CALL, "</tool_call>"]
WEATHER = pb.Tool(
    name="weather",
    description="The weather in a city",
    parameters=json.dumps(
        {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
        | {"additionalProperties": False}
    ),
)
TIME = pb.Tool(name="time", parameters='{"type": "object", "properties": {}, "additionalProperties": false}')
INSERT = ("<PRE>", "<SUF>", "<MID>")


class Chats:
    """The API, with the answers put together."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = InferenceServiceStub(channel)

    def ask(
        self, model: str, *tools: pb.Tool, messages: Sequence[model_pb2.Message] = (), **fields: object
    ) -> tuple[str, str, list[tuple[str, object]], str]:
        """Return thoughts, text, calls and the reason for the end."""
        turns = messages or [model_pb2.Message(role="user", content="what now")]
        request = pb.ChatRequest(model=model, messages=turns, tools=tools, **fields)  # type: ignore[arg-type]
        request.parameters.num_predict, request.parameters.temperature = 600, 0.8
        request.parameters.num_ctx, request.parameters.seed = 2048, 3
        deltas = []
        for event in self.stub.Chat(request):
            if event.HasField("delta"):
                deltas.append(event.delta)
        calls = [call for delta in deltas for call in delta.tool_calls]
        assert all(call.id.startswith("call_") for call in calls)
        assert len({call.id for call in calls}) == len(calls)
        return (
            "".join(delta.thinking for delta in deltas),
            "".join(delta.text for delta in deltas),
            [(call.name, json.loads(call.arguments)) for call in calls],
            pb.AnswerDone.FinishReason.Name(event.done.finish_reason).removeprefix("FINISH_REASON_"),
        )


@pytest.fixture
def chats(product: Product, tmp_path: Path) -> Iterator[Chats]:
    texts = [piece for piece in THINKS if piece.strip("<>/") != piece or " " in piece or piece == "maybe"]
    make_scripted_llama(tmp_path / "thinks.gguf", THINKS, texts=texts, chat_template=THINKING, n_ctx=2048)
    opened = ["well", "</think>", "yes"]
    make_scripted_llama(tmp_path / "opened.gguf", opened, texts=opened, chat_template=OPENED, n_ctx=2048)
    make_tiny_llama(tmp_path / "any.gguf", chat_template=HERMES, specials=INSERT, n_ctx=2048)
    product.start()
    for name in ("thinks", "opened", "any"):
        (tmp_path / f"{name}.modelfile").write_text(f"FROM ./{name}.gguf\n")
        product.lm("create", name, "-f", str(tmp_path / f"{name}.modelfile"))
    with grpc.insecure_channel(f"unix:{product.socket}") as channel:
        yield Chats(channel)


def test_functions_and_thoughts(chats: Chats, product: Product) -> None:
    assert chats.ask("thinks", WEATHER) == ("maybe", "sure.", [("weather", {"city": "Rome"})], "TOOL_CALLS")
    none = chats.ask("thinks", WEATHER, tool_choice=pb.TOOL_CHOICE_NONE)
    assert none == chats.ask("thinks")
    assert (none[0], none[2], none[3]) == ("maybe", [], "STOP")
    assert "<tool_call>" in none[1]
    # Told not to, this one thinks all the same; nobody is to take that for the answer.
    assert chats.ask("thinks", think=pb.THINK_OFF)[0] == "maybe"
    assert chats.ask("opened", think=pb.THINK_ON) == ("well", "yes", [], "STOP")
    assert product.json("show", "thinks")["capabilities"] == ["completion", "chat", "tools", "thinking"]
    assert product.json("show", "any")["capabilities"] == ["completion", "chat", "tools", "insert"]
    done = product.lm("run", "opened", "what", "now")
    assert (done.stdout, done.stderr) == ("yes\n", "--- thinking ---\nwell\n--- answer ---\n")
    assert product.json("run", "--no-think", "opened", "what now")["thinking"] == "well"
    refused = json.loads(product.lm("run", "--json", "--think", "any", "what now", code=1).stderr)["error"]
    assert (refused["reason"], "thinking" in refused["message"]) == ("CAPABILITY_MISSING", True)


def test_calls_that_must_come(chats: Chats) -> None:
    """The weights are random: nothing else makes this model call anything."""
    _, text, calls, reason = chats.ask("any", WEATHER, TIME, tool_choice=pb.TOOL_CHOICE_REQUIRED)
    assert (text, reason, bool(calls)) == ("", "TOOL_CALLS", True)
    for name, arguments in calls:
        assert (name, arguments) in [("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"}), ("time", {})]
    for tool in (WEATHER, TIME):
        _, _, calls, _ = chats.ask("any", WEATHER, TIME, tool_name=tool.name)
        assert {name for name, _ in calls} == {tool.name}


def test_calls_and_results_reach_the_template(chats: Chats) -> None:
    turns = [
        model_pb2.Message(role="user", content="what now"),
        model_pb2.Message(role="assistant", thinking="hm"),
        model_pb2.Message(role="tool", content="22 C"),
    ]
    turns[1].tool_calls.add(id="x", name="weather", arguments='{"city": "Rome"}')
    request = pb.ApplyTemplateRequest(model="any", messages=turns, tools=[WEATHER])
    prompt = chats.stub.ApplyTemplate(request).prompt
    assert '"description": "The weather in a city"' in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in prompt
    assert "[tool]22 C" in prompt
    del request.tools[:]
    assert "# Tools" not in chats.stub.ApplyTemplate(request).prompt
    assert chats.stub.ApplyTemplate(
        pb.ApplyTemplateRequest(model="thinks", messages=turns, think=pb.THINK_OFF)
    ).prompt.endswith("<think>\n\n</think>\n\n")


def test_gaps_are_filled_where_the_model_can(chats: Chats) -> None:
    request = pb.GenerateRequest(model="any", prompt="the old", suffix="the sea")
    request.parameters.num_predict = 5
    *_, end = chats.stub.Generate(request)
    texts = [chats.stub.Tokenize(pb.TokenizeRequest(model="any", text=text)) for text in ("the old", "the sea")]
    # Three marks and the beginning come with them.
    assert end.done.prompt_tokens == sum(len(tokens.tokens) for tokens in texts) + 4
    request.model = "opened"
    with pytest.raises(grpc.RpcError) as caught:
        list(chats.stub.Generate(request))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "insert" in str(caught.value.details())


def test_a_template_for_one_request(chats: Chats) -> None:
    def generate(template: str) -> str:
        request = pb.GenerateRequest(model="any", prompt="the old", template=template)
        request.parameters.num_predict = 5
        return "".join(event.delta.text for event in chats.stub.Generate(request))

    assert generate("{{ messages[0].content }} house")
    assert generate("{{ .Prompt }} house")
    with pytest.raises(grpc.RpcError, match="line 1, column 20: missing value for if"):
        generate("{{ .Prompt }}{{ if }}")
