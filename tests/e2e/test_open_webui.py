"""What Open WebUI sends, replayed request by request, and what it reads of the answers.

`tests/data/open_webui.json` has the requests. In what is expected, an object may have more fields than named; a list of
one pattern is a list that is not empty and whose items all fit, an empty list is any list, and a word with `$` is a
kind (`KINDS`). `each` and `last` are patterns for the objects of a stream. `until` asks again until the answer fits.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

import gguf
import pytest

from lmd.registry.digest import Digest
from tests.support.compatibility import parts, read, response_problems
from tests.support.hub import HubServer
from tests.support.ollama import Reply
from tests.support.product import Product, installed, wait_until
from tests.support.shared_models import STORIES
from tests.support.tiny_models import CHATML, make_tiny_bert, make_tiny_llama

pytestmark = pytest.mark.e2e

RECORD = Path(__file__).resolve().parents[1] / "data" / "open_webui.json"


def _version(value: str) -> bool:
    return all(part.isdecimal() for part in value.split("-")[0].split("."))


KINDS: dict[str, Callable[[Any], bool]] = {
    "$text": lambda value: isinstance(value, str),
    "$string": lambda value: isinstance(value, str) and bool(value),
    "$tagged": lambda value: isinstance(value, str) and ":" in value.rpartition("/")[2],
    "$number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "$natural": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "$positive": lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
    "$bool": lambda value: isinstance(value, bool),
    "$time": lambda value: datetime.fromisoformat(value).tzinfo is not None,
    "$digest": lambda value: re.fullmatch(r"[0-9a-f]{64}", value) is not None,
    "$version": _version,
}


def misfit(wanted: Any, found: Any, where: str = "the answer") -> str:
    """Return what of *found* is not as *wanted*; nothing when all is."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return f"{where} is {found!r} and no object"
        missing = wanted.keys() - found.keys()
        if missing:
            return f"{where} lacks {', '.join(sorted(missing))}: {found!r}"
        return next(filter(None, (misfit(wanted[name], found[name], f"{where}.{name}") for name in wanted)), "")
    if isinstance(wanted, list):
        if not isinstance(found, list) or (wanted and not found):
            return f"{where} is {found!r} and no list with something in it"
        return next(filter(None, (misfit(wanted[0], item, f"{where}[]") for item in found)), "") if wanted else ""
    if isinstance(wanted, str) and wanted in KINDS:
        return "" if KINDS[wanted](found) else f"{where} is {found!r}, not {wanted}"
    return "" if wanted == found else f"{where} is {found!r}, not {wanted!r}"


def objects_of(reply: Reply) -> list[Any]:
    """Return what a stream consists of, as Open WebUI takes it apart."""
    lines = [line.strip() for line in reply.body.decode().split("\n")]
    if reply.content_type.startswith("text/event-stream"):
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        return [json.loads(line) for line in data[:-1]]
    return [json.loads(line) for line in lines if line]


def judged(expected: dict[str, Any], reply: Reply) -> str:
    """Return what is wrong with an answer; nothing when Open WebUI can work with it."""
    status = expected["status"]
    if (reply.status < 400) if status == "error" else (reply.status != status):
        return f"status {reply.status}: {reply.body[:300]!r}"
    if "content-encoding" in reply.headers:
        return "the answer is compressed, and its headers are copied back with what was unpacked"
    if not reply.content_type.startswith(expected.get("type", "")):
        return f"the type is {reply.content_type}"
    if "raw" in expected and reply.body.decode() != expected["raw"]:
        return f"the answer is {reply.body!r}"
    if "body" in expected:
        return misfit(expected["body"], reply.json)
    if "each" in expected:
        objects = objects_of(reply)
        problems = [misfit(expected["each"], one, f"object {number}") for number, one in enumerate(objects)]
        problems.append(misfit(expected["last"], objects[-1], "the last object"))
        return next(filter(None, problems), "")
    return ""


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    files = tmp_path_factory.mktemp("m")
    make_tiny_llama(files / "chat.gguf", chat_template=CHATML)
    make_tiny_bert(files / "encoder.gguf", pooling=gguf.PoolingType.CLS)
    with HubServer() as hub, installed(tmp_path_factory.mktemp("h"), HF_ENDPOINT=hub.endpoint) as made:
        hub.add_repo("test/stories", {STORIES.name: STORIES})
        made.start()
        for path in sorted(files.iterdir()):
            made.lm("pull", str(path))
        yield made


def test_a_day_of_open_webui(product: Product, tmp_path: Path) -> None:
    upload = make_tiny_llama(tmp_path / "tiny-chat.gguf", chat_template=CHATML, n_layer=1)
    names = {
        "CHAT": "chat:latest",
        "EMBED": "encoder:latest",
        "HUB_MODEL": "hf.co/test/stories:latest",
        "DIGEST": str(Digest.of(upload.read_bytes())),
    }
    requests = json.loads(Template(RECORD.read_text()).safe_substitute(names))["requests"]
    assert len(requests) > 30
    # One connection that stays, as aiohttp's pool has.
    connection = http.client.HTTPConnection(urlsplit(product.http_url).netloc, timeout=60)

    def ask(one: dict[str, Any]) -> Reply:
        body = one.get("body")
        data = upload.read_bytes() if body == "${FILE}" else None if body is None else json.dumps(body).encode()
        connection.request(one["method"], one["path"], data, one["headers"])
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, headers.get("content-type", ""), headers, response.read())

    rows = read(parts()).rows
    untold: set[str] = set()
    for one in requests:
        if one["expect"].get("until"):
            wait_until(lambda one=one: not judged(one["expect"], ask(one)), one["what"])  # type: ignore[misc]
            continue
        reply = ask(one)
        problem = judged(one["expect"], reply)
        assert not problem, f"{one['what']}: {one['method']} {one['path']} {one.get('body')}\n{problem}"
        if reply.status < 400 and reply.body:
            untold.update(response_problems(rows, f"{one['method']} {one['path']}", objects_of(reply)))
    connection.close()
    assert not untold, "\n".join(sorted(untold))
    left = {model["name"] for model in product.json("ls")}
    assert left == {"chat:latest", "encoder:latest"}


def test_answers_that_open_webui_could_not_read_are_noticed() -> None:
    def told(expected: dict[str, Any], body: object, status: int = 200, encoding: str = "") -> str:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-encoding": encoding} if encoding else {}
        return judged({"status": 200, **expected}, Reply(status, "application/json", headers, data))

    assert told({}, {}, status=500).startswith("status 500")
    assert told({"status": "error"}, {}).startswith("status 200")
    assert "compressed" in told({}, {}, encoding="gzip")
    assert "type" in told({"type": "application/x-ndjson"}, {})
    assert "lacks model" in told({"body": {"models": [{"model": "$tagged"}]}}, {"models": [{"name": "x"}]})
    assert "$tagged" in told({"body": {"models": [{"model": "$tagged"}]}}, {"models": [{"model": "x"}]})
    assert "something in it" in told({"body": {"models": [{}]}}, {"models": []})
    assert not told({"body": {"models": []}}, {"models": [{"more": 1}]})
    assert "object 1" in told({"each": {"status": "$string"}, "last": {}}, b'{"status":"x"}\n{"error":"y"}\n')
    assert "last" in told({"each": {}, "last": {"done": True}}, b'{"done":true}\n{"done":false}\n')
