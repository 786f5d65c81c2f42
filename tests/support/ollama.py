"""Talks to the gateway as Ollama's clients do, and as none of them would."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf

from tests.support.product import Product
from tests.support.shared_models import STORIES
from tests.support.tiny_models import CHATML, make_scripted_llama, make_tiny_bert, make_tiny_llama

#: Renders all that a chat can have, so that a model with it has every capability of a template.
FULL = (
    "{% for t in tools or [] %}<function>{{ t.function.name }}</function>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": "é"}}\n</tool_call>'
#: Ten times as many tokens are what Ollama's clients get at most: more than any test waits for.
LONG_CTX = 1 << 15
#: What the model `script` says.
SCRIPT = (" the", " people", " went", " to", " water")
SAID = "the people went to water"


def install_models(product: Product, files: Path) -> None:
    """Give a running product a model of each kind, made in *files*.

    `stories` has no template; `chat`, `full` and `long` never end by themselves; `full` has all that templates can
    have, and `long` has room for a test to do something while it answers; `script` says `SAID`, `thinker` thinks,
    answers and calls; `encoder` embeds; `ranker` ranks.
    """
    shutil.copy(STORIES, files / "stories.gguf")
    make_tiny_llama(files / "chat.gguf", chat_template=CHATML)
    make_tiny_llama(files / "full.gguf", chat_template=FULL)
    make_tiny_llama(files / "long.gguf", n_ctx=LONG_CTX)
    make_scripted_llama(files / "script.gguf", SCRIPT, chat_template=CHATML)
    thoughts = ("<think>", " look", "</think>", " the", " water", CALL)
    make_scripted_llama(files / "thinker.gguf", thoughts, chat_template=FULL, texts=("<think>", "</think>", CALL))
    make_tiny_bert(files / "encoder.gguf", pooling=gguf.PoolingType.CLS)
    make_tiny_bert(files / "ranker.gguf", pooling=gguf.PoolingType.RANK, classifier=True)
    for path in sorted(files.iterdir()):
        product.lm("pull", str(path))


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    content_type: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        """The objects of a stream."""
        assert self.body.endswith(b"\n")
        return [json.loads(line) for line in self.body[:-1].split(b"\n")]


@dataclass(frozen=True)
class Gateway:
    """Where the gateway answers."""

    url: str

    def post(self, path: str, body: object = None, *, raw: bytes | None = None) -> Reply:
        """Send JSON, or *raw* bytes, and read the whole answer."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            data = json.dumps(body).encode() if raw is None else raw
            connection.request("POST", path, data, {"content-type": "application/json"})
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, headers.get("content-type", ""), headers, response.read())
        finally:
            connection.close()

    @contextmanager
    def sent(self, path: str, body: object) -> Iterator[http.client.HTTPConnection]:
        """Send JSON, and yield the connection; leaving the block hangs up."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            yield connection
        finally:
            connection.close()

    @contextmanager
    def stream(self, path: str, body: object) -> Iterator[http.client.HTTPResponse]:
        """Send JSON, and yield the answer to read from; leaving the block hangs up."""
        with self.sent(path, body) as connection, connection.getresponse() as response:
            yield response


def gateway(product: Product) -> Gateway:
    """Return the gateway of a product whose daemon runs."""
    url = product.json("status")["http"]
    assert url, "the gateway does not run"
    return Gateway(url)
