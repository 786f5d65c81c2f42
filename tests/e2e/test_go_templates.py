"""Modelfiles of well-known families, made and used with the installed product, in both template languages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import ollama
import pytest

from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2
from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.library_models import CASES, CHATS, FAMILIES, LANGUAGES, modelfile, prompt
from tests.support.product import Product, installed
from tests.support.tiny_models import CHATML, make_scripted_llama, make_tiny_llama

pytestmark = pytest.mark.e2e

FILL = "{{ if .Suffix }}<PRE>{{ .Prompt }}<SUF>{{ .Suffix }}<MID>{{ else }}{{ .Prompt }}{{ end }}"
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
CALLS = ("<fn>", CALL, "</fn>")
CALLING = """{{ range .Messages }}[{{ .Role }}]{{ .Content }}
{{- range .ToolCalls }}<fn>{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}</fn>{{ end }}
{{ end }}{{ if .Tools }}{{ .Tools }}{{ end }}[answer]"""
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("library")
    make_tiny_llama(folder / "base.gguf", chat_template=CHATML, n_ctx=4096)
    make_scripted_llama(folder / "calls.gguf", CALLS, texts=CALLS, n_ctx=4096)
    with installed(tmp_path_factory.mktemp("h")) as made:
        made.start()
        for name in ("base", "calls"):
            create(made, folder, name, f"FROM ./{name}.gguf")
        yield made


@pytest.fixture
def client(product: Product) -> Iterator[ollama.Client]:
    with ollama.Client(product.http_url) as made:
        yield made


def create(product: Product, folder: Path, name: str, text: str, *, code: int = 0) -> str:
    """Make a model as a user does; return what was said about it."""
    path = folder / f"{name}.modelfile"
    path.write_text(text)
    return product.lm("create", name, "-f", str(path), code=code).stderr


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_modelfiles_of_families(product: Product, tmp_path: Path, family: str, language: str) -> None:
    name = f"{family}-{language}"
    create(product, tmp_path, name, modelfile(family, language))
    with grpc.insecure_channel(f"unix:{product.socket}") as channel:
        stub = InferenceServiceStub(channel)
        for shown in [chat for of, chat in CASES if of == family]:
            chat = CHATS[shown]
            request = pb.ApplyTemplateRequest(model=name, think=pb.Think.ValueType(chat.think))
            for turn in chat.messages:
                request.messages.append(model_pb2.Message.FromString(turn.SerializeToString()))
            for tool in chat.tools:
                request.tools.add(name=tool.name, description=tool.description, parameters=tool.parameters)
            if family == "alpaca" and shown == "first":
                # Its own system prompt is not in the prompt that is expected.
                assert stub.ApplyTemplate(request).prompt == "Below is an instruction. Write a response." + prompt(
                    family, shown
                )
                continue
            assert stub.ApplyTemplate(request).prompt == prompt(family, shown)


def test_what_does_not_compile_is_told_where_it_stands(product: Product, tmp_path: Path, client: ollama.Client) -> None:
    said = create(product, tmp_path, "bad", 'FROM base\nTEMPLATE """{{ .Prompt }}\n{{ if .System }}"""', code=2)
    assert "line 3" in said
    assert "{{end}} is missing" in said
    with pytest.raises(
        ollama.ResponseError, match=r"template error: line 2, column 4: unexpected \{\{end\}\}"
    ) as refused:
        client.create("bad", from_="base", template="{{ .Prompt }}\n{{ end }}")
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="line 1, column 20: missing value for if"):
        client.generate("base", "Hi", template="{{ .Prompt }}{{ if }}")


def test_jinja_that_does_not_compile_makes_no_model(product: Product, tmp_path: Path, client: ollama.Client) -> None:
    said = create(product, tmp_path, "bad", 'FROM base\nTEMPLATE """{{ messages }}\n{% if %}"""', code=2)
    assert "the template does not compile: line 2: Expected an expression" in said
    with pytest.raises(ollama.ResponseError, match="does not compile: line 1: ") as refused:
        client.create("bad", from_="base", template="{{ messages | nothing }}")
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.show("bad")


def test_a_model_made_through_ollamas_own_client(client: ollama.Client) -> None:
    client.create("made", from_="base", template="<{{ .System }}|{{ .Prompt }}>{{ .Response }}!", system="Be brief.")
    shown = client.show("made")
    assert shown.template == "<{{ .System }}|{{ .Prompt }}>{{ .Response }}!"
    assert shown.modelfile is not None
    assert "TEMPLATE <{{ .System }}|{{ .Prompt }}>{{ .Response }}!\n" in shown.modelfile
    answer = client.generate("made", "Hi", options={"num_predict": 3, "temperature": 0})
    same = client.generate("base", "<Be brief.|Hi>", raw=True, options={"num_predict": 3, "temperature": 0})
    assert (answer.response, answer.prompt_eval_count) == (same.response, same.prompt_eval_count)


def test_a_template_of_one_request(client: ollama.Client) -> None:
    greedy = {"num_predict": 5, "temperature": 0}
    answer = client.generate("base", "Hi", template="<{{ .Prompt }}>{{ .Response }}</s>", options=greedy)
    assert answer.response == client.generate("base", "<Hi>", raw=True, options=greedy).response


def test_a_gap_is_filled_as_the_template_says(client: ollama.Client) -> None:
    greedy = {"num_predict": 5, "temperature": 0}
    client.create("fills", from_="base", template=FILL)
    assert "insert" in (client.show("fills").capabilities or [])
    answer = client.generate("fills", "a", suffix="z", options=greedy)
    same = client.generate("base", "<PRE>a<SUF>z<MID>", raw=True, options=greedy)
    assert (answer.response, answer.prompt_eval_count) == (same.response, same.prompt_eval_count)
    with pytest.raises(ollama.ResponseError, match="insert"):
        client.generate("base", "a", suffix="z")


def test_calls_are_read_as_the_template_writes_them(client: ollama.Client) -> None:
    client.create("caller", from_="calls", template=CALLING)
    assert "tools" in (client.show("caller").capabilities or [])
    answer = client.chat("caller", [{"role": "user", "content": "Hi"}], tools=[WEATHER])
    (call,) = answer.message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "Rome"})
    assert not answer.message.content


def test_a_bomb_costs_its_own_request(product: Product, client: ollama.Client) -> None:
    client.create("bomb", from_="base", template="{{ range 99999 }}{{ range 99999 }}{{ end }}{{ end }}{{ .Prompt }}")
    with pytest.raises(ollama.ResponseError, match=r"more than 1000000 steps|longer than"):
        client.generate("bomb", "Hi")
    flood = {"model": "base", "prompt": "Hi", "template": "{{ range 9999999 }}{{ $.Prompt }}aaaaaaaaaaaaaaaa{{ end }}"}
    answer = httpx.post(f"{product.http_url}/api/generate", json=flood, timeout=60)
    assert answer.status_code >= 400
    assert "more than" in answer.json()["error"] or "longer than" in answer.json()["error"]
    assert client.generate("base", "Hi", options={"num_predict": 1}).done
