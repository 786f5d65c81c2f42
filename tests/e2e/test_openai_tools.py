"""Functions and thoughts, as OpenAI's client asks for them and reads them, from models that say what a test wants."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.families import HERMES, THINKING
from tests.support.product import Product, installed
from tests.support.tiny_models import make_scripted_llama, make_tiny_llama

pytestmark = pytest.mark.e2e

ASK: Any = [{"role": "user", "content": "what now"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city", "parameters": CITY},
}
NOTHING: Any = {
    "type": "function",
    "function": {"name": "nothing", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
CALL = '\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
SCRIPTS: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "caller": (HERMES, ["sure", "<tool_call>", CALL, "</tool_call>"], ()),
    "thinker": (THINKING, ["<think>", "\nmaybe", " yes\n", "</think>", "\n\nsure", " one"], ()),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("models")
    for name, (template, script, specials) in SCRIPTS.items():
        texts = [piece for piece in script if piece not in specials and piece != " one"]
        path = folder / f"{name}.gguf"
        make_scripted_llama(path, script, chat_template=template, texts=texts, specials=specials, n_ctx=2048)
    make_tiny_llama(folder / "random.gguf", chat_template=HERMES, n_ctx=2048)
    with installed(tmp_path_factory.mktemp("h"), LMD_HTTP_LISTEN="127.0.0.1:0") as product:
        product.start()
        for name in (*SCRIPTS, "random"):
            product.lm("pull", str(folder / f"{name}.gguf"))
        yield product


@pytest.fixture
def client(served: Product) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.json('status')['http']}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_call_is_read_and_its_result_is_given_back(client: OpenAI) -> None:
    made: Any = client.chat.completions.create(model="caller", messages=ASK, tools=[WEATHER])
    (choice,) = made.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", "sure", "function")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    assert call.id.startswith("call_")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages: Any = [*ASK, choice.message.to_dict(), result]
    again = client.chat.completions.create(model="caller", messages=messages, tools=[WEATHER])
    assert again.usage is not None
    assert made.usage is not None
    assert again.usage.prompt_tokens > made.usage.prompt_tokens


def test_streamed_call(client: OpenAI) -> None:
    chunks: Any = list(client.chat.completions.create(model="caller", messages=ASK, tools=[WEATHER], stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        (0, "weather", {"city": "Rome"})
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "sure"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_looks_like_a_call_is_text_where_no_function_was_offered(client: OpenAI) -> None:
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [NOTHING]}):
        made: Any = client.chat.completions.create(model="caller", messages=ASK, **options)
        assert made.choices[0].finish_reason == "stop"
        assert made.choices[0].message.tool_calls is None
        assert CALL.strip() in made.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_call_that_must_be_made_is_made(client: OpenAI, choice: Any, stream: bool) -> None:
    """The model is random: only the grammar makes it call."""
    options: Any = {"model": "random", "messages": ASK, "tools": [WEATHER], "tool_choice": choice, "seed": 5}
    if stream:
        chunks: Any = list(client.chat.completions.create(stream=True, **options))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        reason = chunks[-1].choices[0].finish_reason
    else:
        made: Any = client.chat.completions.create(**options)
        calls, reason = made.choices[0].message.tool_calls, made.choices[0].finish_reason
    assert reason == "tool_calls"
    assert calls
    for call in calls:
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


def test_choice_among_functions_must_name_one_of_them(client: OpenAI) -> None:
    for choice in ({"type": "function", "function": {"name": "nobody"}}, "perhaps", {"type": "custom"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="caller", messages=ASK, tools=[WEATHER], tool_choice=choice)  # type: ignore[call-overload]
        assert caught.value.param == "tool_choice"


def test_thoughts_are_told_apart(client: OpenAI) -> None:
    made: Any = client.chat.completions.create(model="thinker", messages=ASK, reasoning_effort="medium")
    message = made.choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == ("maybe yes", "maybe yes", "sure one")
    chunks: Any = list(client.chat.completions.create(model="thinker", messages=ASK, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "maybe yes"
    assert "".join(delta.content or "" for delta in deltas) == "sure one"
    kinds = ["thought" if getattr(delta, "reasoning", None) else "text" for delta in deltas[1:-1]]
    assert kinds == sorted(kinds, reverse=True)
