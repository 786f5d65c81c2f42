"""Ollama's routes that run models, asked as its documentation shows, and by its real clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings

from tests.support.compatibility import parts, read
from tests.support.ollama import CALL, SAID, SCRIPT, Gateway, gateway, install_models
from tests.support.product import Product, installed

pytestmark = pytest.mark.e2e

NINE = {"temperature": 0, "seed": 7, "num_predict": 9}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """An installation whose daemon runs, with a model of each kind."""
    with installed(tmp_path_factory.mktemp("h"), LMD_HTTP_LISTEN="127.0.0.1:0") as product:
        product.start()
        install_models(product, tmp_path_factory.mktemp("models"))
        yield product


@pytest.fixture(scope="module")
def api(running: Product) -> Gateway:
    return gateway(running)


@pytest.fixture
def client(api: Gateway) -> Iterator[ollama.Client]:
    with ollama.Client(api.url) as made:
        yield made


@contextlib.contextmanager
def clients_closed(made: ChatOllama | OllamaEmbeddings) -> Iterator[None]:
    """Close the connections of what leaves that to the end of the process."""
    try:
        yield
    finally:
        assert made._client is not None
        made._client.close()  # type: ignore[no-untyped-call]


def resident(product: Product) -> list[str]:
    return [runner["name"] for runner in product.json("ps") if runner["state"] == "ready"]


# As Ollama's documentation shows it


def test_curl_gets_an_answer(api: Gateway) -> None:
    body = '{"model": "script", "prompt": "Why is the sky blue?", "stream": false}'
    command = ["curl", "--silent", "--fail", f"{api.url}/api/generate", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (answer["model"], answer["response"].strip(), answer["done"]) == ("script", SAID, True)
    assert answer["done_reason"] == "stop"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", answer["created_at"])
    durations = {key for key in answer if key.endswith("_duration")}
    assert durations >= {"total_duration", "prompt_eval_duration", "eval_duration"}
    assert all(isinstance(answer[key], int) and answer[key] > 0 for key in durations)
    assert answer["total_duration"] >= answer["eval_duration"]
    assert answer["eval_count"] == len(SCRIPT)
    assert answer["prompt_eval_count"] > 0


def test_streams_are_the_default_and_lines_of_json(api: Gateway) -> None:
    reply = api.post("/api/generate", {"model": "script", "prompt": "hello"})
    assert (reply.status, reply.content_type) == (200, "application/x-ndjson")
    *pieces, last = reply.lines
    assert "".join(piece["response"] for piece in pieces).strip() == SAID
    assert all(set(piece) == {"model", "created_at", "response", "done"} and not piece["done"] for piece in pieces)
    assert (last["response"], last["done"], last["done_reason"]) == ("", True, "stop")
    whole = api.post("/api/generate", {"model": "script", "prompt": "hello", "stream": False})
    assert whole.content_type == "application/json; charset=utf-8"
    assert whole.json["response"] == "".join(piece["response"] for piece in pieces)
    assert whole.json["eval_count"] == last["eval_count"]


def test_chats_stream_messages(api: Gateway) -> None:
    messages = [{"role": "USER", "content": "hello"}]
    *pieces, last = api.post("/api/chat", {"model": "script", "messages": messages}).lines
    assert {piece["message"]["role"] for piece in pieces} == {"assistant"}
    assert "".join(piece["message"]["content"] for piece in pieces).strip() == SAID
    assert last["message"] == {"role": "assistant", "content": ""}
    assert (last["done"], last["done_reason"]) == (True, "stop")


# Ollama's own package


def test_the_package_generates_and_chats(client: ollama.Client) -> None:
    whole = client.generate("chat", "the people", options=NINE)
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 9)
    streamed = list(client.generate("chat", "the people", options=NINE, stream=True))
    assert "".join(piece.response or "" for piece in streamed) == whole.response
    assert streamed[-1].prompt_eval_count == whole.prompt_eval_count
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the people"}]
    answer = client.chat("chat", turns, options=NINE)
    pieces = list(client.chat("chat", turns, options=NINE, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == answer.message.content
    assert answer.message.role == "assistant"
    assert answer.message.content != whole.response


def test_the_package_works_asynchronously(api: Gateway, client: ollama.Client) -> None:
    turns = [{"role": "user", "content": "the people"}]

    async def answers() -> list[str]:
        async with ollama.AsyncClient(api.url) as there:
            return await asked(there)

    async def asked(there: ollama.AsyncClient) -> list[str]:
        one = (await there.generate("chat", "the people", options=NINE)).response or ""
        two = (await there.chat("chat", turns, options=NINE)).message.content or ""
        pieces = [piece async for piece in await there.chat("chat", turns, options=NINE, stream=True)]
        vectors = (await there.embed("encoder", ["the water"])).embeddings
        return [one, two, "".join(piece.message.content or "" for piece in pieces), str(len(vectors[0]))]

    generated, chatted, streamed, size = asyncio.run(answers())
    assert generated == client.generate("chat", "the people", options=NINE).response
    assert chatted == streamed == client.chat("chat", turns, options=NINE).message.content
    assert size == "64"


def test_answers_have_the_format_that_was_asked_for(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"big": {"type": "boolean"}, "kind": {"enum": ["cat", "dog"]}},
        "required": ["big", "kind"],
        "additionalProperties": False,
    }
    options = {"temperature": 0, "num_predict": 200}
    made = json.loads(client.generate("chat", "a cat", format=schema, options=options).response or "")
    assert set(made) == {"big", "kind"}
    assert made["kind"] in ("cat", "dog")
    told = client.chat("chat", [{"role": "user", "content": "a cat"}], format=schema, options=options)
    assert set(json.loads(told.message.content or "")) == {"big", "kind"}


def test_functions_and_their_results_reach_the_template(api: Gateway, client: ollama.Client) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        return a + b

    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "3 and 4"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 3, "b": 4}}}]},
        {"role": "tool", "content": "7", "tool_name": "add"},
    ]
    answer = client.chat("full", turns, tools=[add], options=NINE)
    assert answer.eval_count == 9
    without = client.chat("full", turns, options=NINE)
    assert (answer.prompt_eval_count or 0) > (without.prompt_eval_count or 0)
    debug = {"model": "full", "messages": turns, "_debug_render_only": True}
    rendered = api.post("/api/chat", debug).json["_debug_info"]["rendered_template"]
    assert '{"name": "add", "arguments": {"a": 3, "b": 4}}' in rendered
    assert "<tool>7</tool>" in rendered
    with pytest.raises(ollama.ResponseError, match="does not support tools") as refused:
        client.chat("chat", turns, tools=[add])
    assert refused.value.status_code == 400


def test_a_format_holds_once_the_model_has_thought(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    options = {"num_predict": 300, "temperature": 0}
    answer = client.chat("thinker", [{"role": "user", "content": "a"}], format=schema, options=options)
    assert (answer.message.thinking, json.loads(answer.message.content or "")) == ("look", {"a": 1})
    generated = client.generate("thinker", "a", format=schema, options=options)
    assert (generated.thinking, json.loads(generated.response or "")) == ("look", {"a": 1})


def test_thoughts_and_calls_have_fields_of_their_own(client: ollama.Client) -> None:
    add = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    turns = [{"role": "user", "content": "hi"}]
    answer = client.chat("thinker", turns, tools=[add])
    assert answer.done_reason == "stop"
    assert answer.message.thinking == "look"
    assert (answer.message.content or "").strip() == "the water"
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("add", {"a": 3, "b": "é"})
    *pieces, last = client.chat("thinker", turns, tools=[add], stream=True)
    assert "".join(piece.message.thinking or "" for piece in pieces) == "look"
    assert "".join(piece.message.content or "" for piece in pieces) == answer.message.content
    assert [call.function.name for piece in pieces for call in piece.message.tool_calls or ()] == ["add"]
    assert last.message.tool_calls is None
    generated = client.generate("thinker", "hi")
    assert generated.thinking == "look"
    # Nobody asked for calls, so this is text.
    assert CALL in (generated.response or "")


def test_models_that_think_do_unless_told_not_to(api: Gateway, client: ollama.Client) -> None:
    def rendered(**more: object) -> str:
        debug = {"model": "full", "messages": [{"role": "user", "content": "hi"}], "_debug_render_only": True}
        return str(api.post("/api/chat", {**debug, **more}).json["_debug_info"]["rendered_template"])

    assert rendered() == rendered(think=True) == rendered(think="high") == "<user>hi</user><assistant>"
    assert rendered(think=False) == "<user>hi</user><assistant><think></think>"
    assert client.chat("full", [{"role": "user", "content": "hi"}], think=False, options=NINE).eval_count == 9
    with pytest.raises(ollama.ResponseError, match='"chat" does not support thinking') as refused:
        client.chat("chat", [{"role": "user", "content": "hi"}], think=True)
    assert refused.value.status_code == 400


def test_logprobs_tell_of_every_token(client: ollama.Client) -> None:
    whole = client.generate("chat", "the people", options=NINE, logprobs=True, top_logprobs=2)
    assert whole.logprobs is not None
    assert len(whole.logprobs) == 9
    assert "".join(token.token for token in whole.logprobs).strip() == (whole.response or "").strip()
    for token in whole.logprobs:
        assert token.top_logprobs is not None
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].token == token.token
    pieces = client.chat("chat", [{"role": "user", "content": "x"}], options=NINE, logprobs=True, stream=True)
    assert sum(len(piece.logprobs or ()) for piece in pieces) == 9


def test_a_conversation_goes_on_with_its_context(api: Gateway, client: ollama.Client) -> None:
    first = client.generate("chat", "the people", system="be brief", options=NINE)
    assert first.context
    body = {"model": "chat", "prompt": "and then", "context": first.context, "_debug_render_only": True}
    rendered = api.post("/api/generate", body).json["_debug_info"]["rendered_template"]
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the people"},
        {"role": "assistant", "content": first.response},
        {"role": "user", "content": "and then"},
    ]
    debug = {"model": "chat", "messages": turns, "_debug_render_only": True}
    assert rendered == api.post("/api/chat", debug).json["_debug_info"]["rendered_template"]
    second = client.generate("chat", "and then", context=first.context, options=NINE)
    assert second.response == client.chat("chat", turns, options=NINE).message.content
    # Without a template, the text goes on.
    begun = client.generate("stories", "Once upon", options=NINE)
    assert begun.context
    more = client.generate("stories", " and", context=begun.context, options=NINE)
    raw = client.generate("stories", f"Once upon{begun.response} and", raw=True, options=NINE)
    assert more.response == raw.response
    assert raw.context is None


def test_templates_and_systems_replace_those_of_the_model(client: ollama.Client, api: Gateway) -> None:
    plain = client.generate("chat", "the people", options=NINE)
    shouted = client.generate("chat", "the people", system="be loud", options=NINE)
    assert shouted.prompt_eval_count != plain.prompt_eval_count
    own = client.generate("chat", "the people", template="{{ messages[-1].content }}", options=NINE)
    raw = client.generate("chat", "the people", raw=True, options=NINE)
    assert own.response == raw.response
    broken = api.post("/api/generate", {"model": "chat", "prompt": "x", "template": "{% if %}"})
    assert (broken.status, list(broken.json)) == (500, ["error"])


# Loading and unloading


def test_empty_requests_load_and_unload(running: Product, api: Gateway) -> None:
    for path, empty, content in (
        ("/api/generate", {}, {"response": ""}),
        ("/api/generate", {"prompt": ""}, {"response": ""}),
        ("/api/chat", {"messages": []}, {"message": {"role": "assistant", "content": ""}}),
    ):
        for keep_alive, reason in ((-1, "load"), (0, "unload")):
            reply = api.post(path, {"model": "script", "keep_alive": keep_alive, **empty})
            assert reply.content_type == "application/json; charset=utf-8"
            answer = reply.json
            assert answer.pop("created_at")
            assert answer == {"model": "script", **content, "done": True, "done_reason": reason}
            assert ("script:latest" in resident(running)) == (reason == "load")


def test_unloading_what_is_not_resident_is_no_error(api: Gateway) -> None:
    for _ in range(2):
        assert api.post("/api/generate", {"model": "script", "keep_alive": "0s"}).json["done_reason"] == "unload"


def test_keep_alive_is_that_of_the_request(running: Product, api: Gateway) -> None:
    def kept() -> dict[str, Any]:
        (runner,) = [runner for runner in running.json("ps") if runner["name"] == "script:latest"]
        return dict(runner)

    api.post("/api/chat", {"model": "script", "keep_alive": -1})
    assert kept()["keep_forever"]
    api.post("/api/embed", {"model": "script", "keep_alive": "1h"})
    assert not kept()["keep_forever"]
    api.post("/api/generate", {"model": "script", "keep_alive": 0})


# Embeddings


def test_embeddings_are_normalised_and_as_many_as_texts(client: ollama.Client) -> None:
    texts = ["the water was great", "they went home", "a small house"]
    together = client.embed("encoder", texts)
    assert [math.hypot(*vector) for vector in together.embeddings] == pytest.approx([1, 1, 1], abs=1e-5)
    for text, vector in zip(texts, together.embeddings, strict=True):
        assert client.embed("encoder", text).embeddings[0] == pytest.approx(list(vector), abs=1e-4)
    cut = client.embed("encoder", texts[0], dimensions=8).embeddings[0]
    assert len(cut) == 8
    assert math.hypot(*cut) == pytest.approx(1, abs=1e-5)
    assert together.prompt_eval_count == 6 + 5 + 5
    assert together.total_duration


def test_what_embeds_nothing_loads(running: Product, api: Gateway) -> None:
    empty: list[dict[str, object]] = [{}, {"input": None}, {"input": ""}, {"input": []}]
    for nothing in empty:
        reply = api.post("/api/embed", {"model": "encoder", **nothing})
        assert (reply.status, reply.json) == (200, {"model": "encoder", "embeddings": []})
    assert api.post("/api/embeddings", {"model": "encoder", "prompt": ""}).json == {"embedding": []}
    assert "encoder:latest" in resident(running)


def test_texts_that_are_too_long_are_cut_unless_that_is_not_wanted(client: ollama.Client) -> None:
    long = "water " * 500
    assert client.embed("encoder", long).prompt_eval_count == 128
    with pytest.raises(ollama.ResponseError, match=r"^the input length exceeds the context length") as refused:
        client.embed("encoder", long, truncate=False)
    assert refused.value.status_code == 400


def test_the_older_route_gives_the_vector_of_the_model(client: ollama.Client) -> None:
    old = list(client.embeddings("encoder", "the water").embedding)
    new = list(client.embed("encoder", "the water").embeddings[0])
    length = math.hypot(*old)
    assert length != pytest.approx(1, abs=1e-2)
    assert [number / length for number in old] == pytest.approx(new, abs=1e-5)


# LangChain


def test_langchain_chats_and_embeds(api: Gateway, client: ollama.Client) -> None:
    everything = ChatOllama(
        model="full",
        base_url=api.url,
        temperature=0,
        seed=7,
        num_predict=9,
        num_ctx=128,
        mirostat=0,
        tfs_z=1.0,
        stop=["nothing says this"],
        keep_alive="5m",
        reasoning=False,
    )
    turns = [
        SystemMessage("be brief"),
        HumanMessage("3 and 4"),
        AIMessage("", tool_calls=[{"name": "add", "args": {"a": 3, "b": 4}, "id": "call_1"}]),
        ToolMessage("7", tool_call_id="call_1"),
    ]
    with clients_closed(everything):
        answer = everything.invoke(turns)
        assert answer.response_metadata["done_reason"] == "length"
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["output_tokens"] == 9
        assert "".join(str(piece.content) for piece in everything.stream(turns)) == answer.content

    async def asked() -> object:
        chat = ChatOllama(model="full", base_url=api.url, temperature=0, seed=7, num_predict=9, reasoning=False)
        async with chat._async_client:
            with clients_closed(chat):
                return (await chat.ainvoke(turns)).content

    assert asyncio.run(asked()) == answer.content


def test_langchain_gets_what_it_asks_for(api: Gateway, client: ollama.Client) -> None:
    schema = {"title": "Size", "type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"]}
    chat = ChatOllama(model="chat", base_url=api.url, temperature=0, num_predict=200)
    with clients_closed(chat):
        made = chat.with_structured_output(schema, method="json_schema").invoke("a cat")
    assert isinstance(made, dict)
    assert isinstance(made["big"], bool)

    def add(a: int, b: str) -> int:
        """Add."""
        return a

    thinker = ChatOllama(model="thinker", base_url=api.url, reasoning=True)
    with clients_closed(thinker):
        called = thinker.bind_tools([add]).invoke("3 and 4")
    assert isinstance(called, AIMessage)
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("add", {"a": 3, "b": "é"})]
    assert called.additional_kwargs["reasoning_content"] == "look"

    embedder = OllamaEmbeddings(model="encoder", base_url=api.url)
    with clients_closed(embedder):
        assert embedder.embed_query("the water") == pytest.approx(client.embed("encoder", "the water").embeddings[0])
        assert len(embedder.embed_documents(["the water", "they went"])) == 2


# What we say beside


def test_answers_tell_what_was_reused_and_dropped(api: Gateway) -> None:
    turns = [{"role": "user", "content": f"{number} " + "water " * 40} for number in range(8)]
    body = {"model": "chat", "messages": turns, "options": {**NINE, "num_ctx": 256}, "stream": False}
    reply = api.post("/api/chat", body)
    said = reply.json["lmd"]
    assert said["dropped_messages"] > 0
    assert reply.headers["x-lmd-dropped-messages"] == str(said["dropped_messages"])
    assert reply.json["prompt_eval_count"] <= 256
    again = api.post("/api/chat", body)
    assert again.json["lmd"]["cached_tokens"] == int(again.headers["x-lmd-prompt-tokens-cached"]) > 0
    assert set(said) == {
        "cached_tokens",
        "dropped_messages",
        "dropped_tokens",
        "shifted_tokens",
        "drafted_tokens",
        "accepted_tokens",
        "queue_duration",
    }
    for refusing in ({"truncate": False}, {"truncate": False, "shift": False}):
        refused = api.post("/api/chat", {**body, **refusing})
        assert refused.status == 400
        assert "the context holds 256" in refused.json["error"]


def test_answers_longer_than_the_context_go_on_unless_told_not_to(api: Gateway) -> None:
    body = {"model": "chat", "prompt": "the people", "stream": False}
    options = {**NINE, "num_ctx": 64, "num_predict": 400}
    shifted = api.post("/api/generate", {**body, "options": options}).json
    assert shifted["eval_count"] == 400
    assert shifted["lmd"]["shifted_tokens"] > 0
    ended = api.post("/api/generate", {**body, "options": options, "shift": False}).json
    assert ended["done_reason"] == "length"
    assert ended["lmd"]["shifted_tokens"] == 0


def test_the_same_as_over_the_other_api(running: Product, client: ollama.Client) -> None:
    asked = ("-o", "temperature=0", "-o", "seed=7", "-o", "num_predict=9")
    for model, prompt in (("chat", "the people went"), ("stories", "Once upon a time")):
        other = running.json("run", model, prompt, *asked)
        answer = client.generate(model, prompt, options=NINE)
        assert answer.response == other["response"]
        assert (answer.prompt_eval_count, answer.eval_count) == (other["prompt_tokens"], other["generated_tokens"])
    chatted = client.chat("chat", [{"role": "user", "content": "the people went"}], options=NINE)
    assert chatted.message.content == running.json("run", "chat", "the people went", *asked)["response"]


@pytest.mark.parametrize("name", ["chat", "chat:latest", "CHAT", "Chat:Latest"])
def test_names_are_as_clients_write_them(client: ollama.Client, name: str) -> None:
    assert client.generate(name, "the people", options=NINE).model == name


def test_every_field_of_an_answer_is_in_the_table_of_compatibility(api: Gateway) -> None:
    turns = [{"role": "user", "content": "hi"}]
    add = {"type": "function", "function": {"name": "add"}}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/api/generate", {"model": "thinker", "prompt": "hi", "logprobs": True, "top_logprobs": 1}),
        ("/api/generate", {"model": "chat", "prompt": "hi", "_debug_render_only": True}),
        ("/api/generate", {"model": "none", "prompt": "hi"}),
        ("/api/generate", {"model": "chat"}),
        ("/api/chat", {"model": "thinker", "messages": turns, "tools": [add], "logprobs": True, "top_logprobs": 1}),
        ("/api/chat", {"model": "chat", "messages": turns, "_debug_render_only": True}),
        ("/api/chat", {"model": "none", "messages": turns}),
        ("/api/embed", {"model": "encoder", "input": "hi"}),
        ("/api/embed", {"model": "none", "input": "hi"}),
        ("/api/embeddings", {"model": "encoder", "prompt": "hi"}),
        ("/api/embeddings", {"model": "none", "prompt": "hi"}),
    ]
    rows = [row for row in read(parts()).rows if row.part == "response"]
    for path in {path for path, _ in asked}:
        for model in ("thinker", "encoder"):
            # Loading takes time, and only then there is a field for it.
            api.post("/api/generate", {"model": model, "keep_alive": 0})
        replies = [api.post(path, {**body, "stream": False}).json for where, body in asked if where == path]
        seen = {name for reply in replies for name in dotted(reply)}
        said = {row.field for row in rows if row.path == path and row.supported != "no"}
        assert seen == said | {name.rpartition(".")[0] for name in said if name.rpartition(".")[0] in seen}, path


def dotted(value: object, prefix: str = "") -> Iterator[str]:
    """Yield the names of all fields, as the table of compatibility writes them."""
    for item in value if isinstance(value, list) else [value]:
        for name, inner in item.items() if isinstance(item, dict) else ():
            yield prefix + name
            # Arguments are the function's own, and alternatives have what tokens have.
            if name not in ("arguments", "top_logprobs"):
                yield from dotted(inner, f"{prefix}{name}.")
