"""Unmodified clients of OpenAI's API against a real daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import grpc
import openai
import psutil
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2
from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.product import Product, installed, wait_until
from tests.support.shared_models import STORIES
from tests.support.tiny_models import CHATML, make_scripted_llama, make_tiny_bert, make_tiny_llama

pytestmark = pytest.mark.e2e

HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """A daemon with models that tell a story, chat, chat without end, embed, and say what a test wants."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_llama(folder / "chat.gguf", chat_template=CHATML, n_ctx=512)
    make_scripted_llama(folder / "ending.gguf", [" one", " two", " three", " four"], chat_template=CHATML)
    make_tiny_bert(folder / "encoder.gguf", pooling=gguf.PoolingType.CLS)
    with installed(tmp_path_factory.mktemp("h"), LMD_HTTP_LISTEN="127.0.0.1:0") as product:
        product.start()
        for path in (folder / "chat.gguf", folder / "ending.gguf", folder / "encoder.gguf", STORIES):
            product.lm("pull", str(path))
        yield product


@pytest.fixture(scope="module")
def base_url(served: Product) -> str:
    return f"{served.json('status')['http']}/v1"


@pytest.fixture
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key="unused", max_retries=0) as made:
        yield made


def chat(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "chat", "messages": HELLO, "max_tokens": 8} | options)


def test_models_are_listed_and_found(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"chat:latest", "ending:latest", "encoder:latest", "stories260k:latest"}
    found = client.models.retrieve("chat")
    assert found == models["chat:latest"]
    assert (found.object, found.owned_by) == ("model", "library")
    assert found.created > 1_600_000_000
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("some/where:else")
    assert caught.value.code == "model_not_found"


def test_chat_and_its_stream_say_the_same(client: OpenAI) -> None:
    whole = chat(client, seed=7, temperature=0.5)
    choice = whole.choices[0]
    assert (whole.object, whole.model, choice.index, choice.message.role) == ("chat.completion", "chat", 0, "assistant")
    assert choice.finish_reason == "length"
    assert whole.id.startswith("chatcmpl-")
    assert whole.usage.completion_tokens == 8
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 8

    chunks = list(chat(client, seed=7, temperature=0.5, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert (
        len({(chunk.id, chunk.created, chunk.model, chunk.object, chunk.system_fingerprint) for chunk in chunks}) == 1
    )
    assert chunks[0].object == "chat.completion.chunk"
    assert [chunk.choices[0].delta.role for chunk in chunks[:-1]] == ["assistant"] + [None] * (len(chunks) - 2)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-2].choices[0].delta.content is None
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    # The second time the prompt is known but for its last token.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    assert chunks[-1].usage.model_copy(update={"prompt_tokens_details": None}) == whole.usage.model_copy(
        update={"prompt_tokens_details": None}
    )


def test_seed_and_defaults(client: OpenAI) -> None:
    one, again, other = (chat(client, seed=seed).choices[0].message.content for seed in (3, 3, 4))
    assert one == again != other
    assert one == chat(client, seed=3, temperature=1, top_p=1).choices[0].message.content
    assert one != chat(client, seed=3, temperature=0.1).choices[0].message.content


def test_manifest_is_stronger_than_the_defaults_of_the_api(served: Product, client: OpenAI, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text("FROM chat\nPARAMETER temperature 0\nPARAMETER num_predict 3\n")
    served.lm("create", "cold", "-f", str(tmp_path / "Modelfile"))
    try:
        made = client.chat.completions.create(model="cold", messages=HELLO)
        assert made.choices[0].message.content == chat(client, temperature=0, max_tokens=3).choices[0].message.content
        hot = client.chat.completions.create(model="cold", messages=HELLO, temperature=2, seed=1)
        assert hot.choices[0].message.content != made.choices[0].message.content
        usage = client.completions.create(model="cold", prompt="the").usage
        assert usage is not None
        assert usage.completion_tokens == 3
    finally:
        served.lm("rm", "cold")


def test_several_choices(client: OpenAI) -> None:
    whole = chat(client, n=3, seed=5)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == 24
    # The first of several is what a request for one gets.
    assert texts[0] == chat(client, seed=5).choices[0].message.content
    streamed = {0: "", 1: "", 2: ""}
    reasons = {}
    for chunk in chat(client, n=3, seed=5, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert list(streamed.values()) == texts
    assert set(reasons.values()) == {"length"}


def test_stops(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="ending", messages=HELLO)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (" one two three four", "stop")
    for stop in (" three", ["nowhere", " three"]):
        cut = client.chat.completions.create(model="ending", messages=HELLO, stop=stop)
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (" one two", "stop")


def test_log_probabilities(client: OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2, temperature=0)
    content = whole.choices[0].logprobs.content
    assert "".join(token.token for token in content) == whole.choices[0].message.content
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].token == token.token
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    streamed = [
        token
        for chunk in chat(client, logprobs=True, top_logprobs=2, temperature=0, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [(token.token, token.logprob) for token in streamed] == [
        (token.token, pytest.approx(token.logprob, abs=1e-4)) for token in content
    ]
    assert all(token.top_logprobs == [] for token in chat(client, logprobs=True).choices[0].logprobs.content)


def test_bias_forbids_a_token(client: OpenAI, base_url: str) -> None:
    first = chat(client, temperature=0, logprobs=True).choices[0].logprobs.content[0].token
    request = {"model": "chat", "content": first.strip(), "with_pieces": True}
    pieces = post(base_url.removesuffix("/v1") + "/tokenize", request)["tokens"]
    (token,) = [piece["id"] for piece in pieces if piece["piece"] == first]
    biased = chat(client, temperature=0, logprobs=True, logit_bias={str(token): -100})
    assert biased.choices[0].logprobs.content[0].token != first


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    good: bool
    word: Literal["yes", "no"]


def test_schema_through_the_parse_helper(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="chat",
        messages=HELLO,
        response_format=Verdict,
        max_tokens=400,
        temperature=0,
    )
    message = parsed.choices[0].message
    assert isinstance(message.parsed, Verdict)
    assert json.loads(message.content or "") == message.parsed.model_dump()


def test_json_and_grammars(client: OpenAI) -> None:
    whole = chat(client, response_format={"type": "json_object"}, temperature=0)
    assert whole.choices[0].message.content.startswith("{")
    with_schema = {"type": "json_object", "schema": Verdict.model_json_schema()}
    whole = chat(client, response_format=with_schema, max_tokens=400, temperature=0)
    assert isinstance(Verdict.model_validate_json(whole.choices[0].message.content), Verdict)
    whole = chat(client, extra_body={"grammar": 'root ::= "yes" | "no"'})
    assert whole.choices[0].message.content in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="grammar"):
        chat(client, response_format={"type": "json_object"}, extra_body={"grammar": 'root ::= "a"'})


def test_what_goes_beyond_the_standard(client: OpenAI, served: Product) -> None:
    greedy = chat(client, temperature=0).choices[0].message.content
    same = chat(client, temperature=1, extra_body={"top_k": 1, "keep_alive": "1h", "priority": "batch", "timeout": 60})
    assert same.choices[0].message.content == greedy
    served.lm("stop", "chat")
    chat(client, extra_body={"num_ctx": 128})
    assert {runner["name"]: runner["context_length"] for runner in served.json("ps")}["chat:latest"] == 128


def test_prompt_that_is_too_long(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "go away " * 300}, *HELLO]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, messages=long, stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    response = client.chat.completions.with_raw_response.create(
        model="chat", messages=long, max_tokens=4, extra_body={"truncation": "auto"}
    )
    assert response.headers["x-lmd-dropped-messages"] == "1"
    usage = response.parse().usage
    assert usage is not None
    assert usage.prompt_tokens < 100


def test_effort_is_no_demand(client: OpenAI) -> None:
    """Clients set it once for all the models they talk to; this one cannot think."""
    plain = chat(client, temperature=0).choices[0].message
    for effort in ("none", "minimal", "low", "medium", "high"):
        assert chat(client, temperature=0, reasoning_effort=effort).choices[0].message == plain


def test_messages_of_all_kinds(client: OpenAI, base_url: str) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "what time"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "now"},
    ]
    assert chat(client, messages=messages).choices[0].finish_reason == "length"
    prompt = post(base_url.removesuffix("/v1") + "/apply-template", {"model": "chat", "messages": messages})["prompt"]
    assert prompt.startswith("<|im_start|>system\nbe\nbrief<|im_end|>\n<|im_start|>user\nwhat time<|im_end|>\n")


def test_completions_continue_the_text_as_it_is(client: OpenAI) -> None:
    made = client.completions.create(model="stories260k", prompt="Once upon a time", temperature=0)
    assert made.object == "text_completion"
    assert made.choices[0].text.startswith(", there was a little girl named")
    assert made.usage is not None
    assert made.usage.completion_tokens == 16  # OpenAI's default
    streamed = client.completions.create(
        model="stories260k",
        prompt="Once upon a time",
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == made.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == made.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage and chunks[-1].usage.prompt_tokens_details}
    )


def test_completions_of_several_prompts_and_of_tokens(client: OpenAI, base_url: str) -> None:
    texts = ["Once upon a time", "The dog"]
    options: dict[str, Any] = {"model": "stories260k", "max_tokens": 6, "temperature": 0}
    alone = [client.completions.create(prompt=text, **options).choices[0].text for text in texts]
    url = base_url.removesuffix("/v1") + "/tokenize"
    tokens = [post(url, {"model": "stories260k", "content": text, "add_special": True})["tokens"] for text in texts]
    for prompt in (texts, tokens):
        together = client.completions.create(prompt=prompt, **options)
        assert [(choice.index, choice.text) for choice in together.choices] == list(enumerate(alone))
        assert together.usage is not None
        assert together.usage.completion_tokens == 12
    assert client.completions.create(prompt=tokens[0], **options).choices[0].text == alone[0]
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(prompt=texts, n=2, stream=True, echo=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [texts[0] + alone[0]] * 2 + [texts[1] + alone[1]] * 2


def test_log_probabilities_of_completions(client: OpenAI) -> None:
    made = client.completions.create(
        model="stories260k", prompt="Once upon a time", temperature=0, logprobs=2, max_tokens=6
    ).choices[0]
    told = made.logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.text_offset is not None
    assert told.top_logprobs is not None
    assert told.token_logprobs is not None
    assert "".join(told.tokens) == made.text
    assert [made.text[offset:].startswith(token) for offset, token in zip(told.text_offset, told.tokens, strict=True)]
    assert told.text_offset[:3] == [0, len(told.tokens[0]), len(told.tokens[0] + told.tokens[1])]
    assert all(
        len(top) == 2 and max(top, key=top.__getitem__) == token
        for top, token in zip(told.top_logprobs, told.tokens, strict=True)
    )


def test_embeddings(client: OpenAI) -> None:
    texts = ["the people went to the house", "water"]
    # The client asks for base64 unless told otherwise, and decodes it.
    packed = client.embeddings.create(model="encoder", input=texts)
    plain = client.embeddings.create(model="encoder", input=texts, encoding_format="float")
    assert [one.index for one in packed.data] == [0, 1]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-5)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == 11
    short = client.embeddings.create(model="encoder", input="water", dimensions=8)
    assert len(short.data[0].embedding) == 8
    assert math.hypot(*short.data[0].embedding) == pytest.approx(1, abs=1e-5)
    for wrong in ([], "", [1, 2, 3], [[1, 2]]):
        with pytest.raises(openai.BadRequestError, match="input"):
            client.embeddings.create(model="encoder", input=wrong)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="encoder", input="water " * 500)
    assert caught.value.code == "context_length_exceeded"


def test_async_client(base_url: str) -> None:
    async def use() -> tuple[str | None, str, int]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="unused") as client:
            options: dict[str, Any] = {"model": "chat", "messages": HELLO, "max_tokens": 8, "temperature": 0}
            whole, stream, embedded = await asyncio.gather(
                client.chat.completions.create(**options),
                client.chat.completions.create(stream=True, **options),
                client.embeddings.create(model="encoder", input="water"),
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return whole.choices[0].message.content, text, len(embedded.data[0].embedding)

    whole, streamed, length = asyncio.run(use())
    assert whole == streamed
    assert length == 64


def test_errors_are_typed(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="nobody")
    body = missing.value.body
    assert isinstance(body, dict)
    assert body == {
        "message": "model `nobody` not found",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    } | {"message": body["message"]}
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]
    wrong: list[tuple[str | None, dict[str, Any]]] = [
        ("temperature", {"temperature": "hot"}),
        ("temperature", {"temperature": -1}),
        ("n", {"n": 0}),
        ("n", {"n": 17}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "nobody", "content": "x"}]}),
        ("messages[0].content[0]", {"messages": image}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logit_bias", {"logit_bias": {"water": 1}}),
        ("logit_bias", {"logit_bias": {"5": 101}}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("keep_alive", {"extra_body": {"keep_alive": "5 parsecs"}}),
        ("num_ctx", {"extra_body": {"num_ctx": 1}}),
        ("model", {"model": "stories260k"}),
    ]
    for param, options in wrong:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                chat(client, stream=stream, **options)
            assert caught.value.param == param, (options, caught.value.message)
            assert caught.value.type == "invalid_request_error"


def test_stream_that_breaks_raises(client: OpenAI, served: Product) -> None:
    """The status is out when the runner dies, so an event tells of it."""
    stream = chat(client, max_tokens=None, stream=True, extra_body={"ignore_eos": True, "context_policy": "shift"})
    seen = [next(stream), next(stream)]
    assert seen[0].choices[0].delta.role == "assistant"
    kill_runner_of(served, "chat:latest")
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert not isinstance(caught.value, openai.APIStatusError | openai.APIConnectionError)
    assert caught.value.code == "runner_crashed"
    # The next request loads the model again.
    assert chat(client).choices[0].finish_reason == "length"


def test_client_that_leaves_frees_its_slots(client: OpenAI, served: Product, base_url: str) -> None:
    endless: Any = {"ignore_eos": True, "context_policy": "shift"}
    stream = chat(client, max_tokens=None, stream=True, n=2, extra_body=endless)
    next(stream)
    body = json.dumps({"model": "chat", "messages": HELLO, **endless})
    whole = subprocess.Popen(["curl", "-s", f"{base_url}/chat/completions", "-d", body], stdout=subprocess.DEVNULL)
    prompts = json.dumps({"model": "chat", "prompt": ["a", "b"], "max_tokens": -1, **endless})
    several = subprocess.Popen(["curl", "-s", f"{base_url}/completions", "-d", prompts], stdout=subprocess.DEVNULL)

    def busy() -> int:
        (runner,) = [runner for runner in served.json("ps") if runner["name"] == "chat:latest"]
        return int(runner["slots_busy"] + runner["queued"])

    wait_until(lambda: busy() >= 4, "all of them are answered, or wait")
    stream.close()
    for process in (whole, several):
        process.kill()
        process.wait()
    wait_until(lambda: busy() == 0, "nothing is busy for clients that left")


def test_full_queue_says_when_to_come_back(lmd_home: Path, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "chat.gguf", chat_template=CHATML)
    settings = {"LMD_HTTP_LISTEN": "127.0.0.1:0", "LMD_RUNTIME_SLOTS": "1", "LMD_RUNTIME_MAX_QUEUE": "4"}
    with installed(lmd_home, **settings) as product, contextlib.ExitStack() as stack:
        product.start()
        product.lm("pull", str(tmp_path / "chat.gguf"))
        client = stack.enter_context(
            OpenAI(base_url=f"{product.json('status')['http']}/v1", api_key="x", max_retries=0)
        )
        running = chat(client, max_tokens=None, stream=True, extra_body={"ignore_eos": True, "context_policy": "shift"})
        stack.callback(running.close)
        next(running)
        for _ in range(3):
            process = subprocess.Popen(
                [
                    "curl",
                    "-s",
                    "-N",
                    f"{client.base_url}chat/completions",
                    "-d",
                    json.dumps({"model": "chat", "messages": HELLO}),
                ],
                stdout=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        wait_until(lambda: product.json("ps")[0]["queued"] == 3, "three requests wait")
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("model", ["stories260k", "chat"])
def test_same_prompt_says_the_same_on_every_route(served: Product, client: OpenAI, model: str) -> None:
    """`/v1/completions` is the raw prompt of gRPC, `/v1/chat/completions` its chat."""
    parameters = model_pb2.Parameters(temperature=0.0, seed=11, num_predict=24)
    options: dict[str, Any] = {"model": model, "temperature": 0, "seed": 11, "max_tokens": 24}
    with grpc.insecure_channel(f"unix:{served.socket}") as channel:
        stub = InferenceServiceStub(channel)
        raw = answer(
            stub.Generate(pb.GenerateRequest(model=model, prompt="the people", raw=True, parameters=parameters))
        )
        completed = client.completions.create(prompt="the people", **options)
        usage = completed.usage
        assert usage is not None
        assert (completed.choices[0].text, usage.prompt_tokens, usage.completion_tokens) == raw
        if model == "stories260k":
            return
        turn = model_pb2.Message(role="user", content="the people")
        chatted = answer(stub.Chat(pb.ChatRequest(model=model, messages=[turn], parameters=parameters)))
        whole = client.chat.completions.create(messages=[{"role": "user", "content": "the people"}], **options)
        assert whole.usage is not None
        assert (whole.choices[0].message.content, whole.usage.prompt_tokens, whole.usage.completion_tokens) == chatted
        # A prompt of the template's making, sent raw, is the same prompt: the template has no beginning-of-text.
        assert raw[0] != chatted[0]


def test_bad_bodies_with_curl(base_url: str) -> None:
    url = f"{base_url}/chat/completions"
    for body, status in (
        ("", 400),
        ("{", 400),
        ("[]", 400),
        ('{"model":"chat","model":"chat","messages":[]}', 400),
        ('{"model":"chat","messages":' + "[" * 5000 + "]" * 5000 + "}", 400),
        ('{"model":5,"messages":[]}', 400),
        ('{"messages":[{"role":"user","content":"x"}]}', 400),
        ('{"model":"","messages":[{"role":"user","content":"x"}]}', 400),
        ('{"model":"a b","messages":[{"role":"user","content":"x"}]}', 400),
        ('{"model":"nobody","messages":[{"role":"user","content":"x"}]}', 404),
    ):
        got, error = curl(url, "-d", "@-", stdin=body)
        assert got == status, body[:60]
        assert set(error["error"]) == {"message", "type", "param", "code"}
        assert error["error"]["message"]
        assert error["error"]["type"] == "invalid_request_error"
    assert curl(url)[0] == 405
    assert curl(f"{base_url}/nothing")[0] == 404


def answer(events: Any) -> tuple[str, int, int]:
    text = ""
    for event in events:
        text += event.delta.text
        if event.HasField("done"):
            return text, event.done.prompt_tokens, event.done.generated_tokens
    raise AssertionError("no end")


def curl(url: str, *options: str, stdin: str = "") -> tuple[int, Any]:
    command = ["curl", "-s", "-w", "\n%{http_code}", *options, url]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True, timeout=30)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


def post(url: str, body: object) -> Any:
    status, answer = curl(url, "-d", "@-", stdin=json.dumps(body))
    assert status == 200, answer
    return answer


def kill_runner_of(product: Product, name: str) -> None:
    (pid,) = [runner["pid"] for runner in product.json("ps") if runner["name"] == name]
    psutil.Process(pid).kill()
