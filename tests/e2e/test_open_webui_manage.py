"""What Open WebUI sends to manage models, replayed: it must be able to use every answer as it does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmd.registry.digest import Digest
from tests.support.hub import HubServer
from tests.support.management import managed
from tests.support.open_webui import RECORDED, Recorded
from tests.support.tiny_models import make_tiny_llama

pytestmark = pytest.mark.e2e


def _replay(client: httpx.Client, request: Recorded, file: Path) -> httpx.Response:
    digest = str(Digest.of(file.read_bytes()))
    content: bytes | None = None
    if request.upload:
        content = file.read_bytes()
    elif request.body is not None:
        content = json.dumps(request.body).replace("{digest}", digest).encode()
    path = request.path.format(digest=digest)
    return client.request(request.method, path, content=content, headers=dict(request.headers))


def _use(request: Recorded, answer: httpx.Response) -> None:
    """Do with an answer what Open WebUI does."""
    assert answer.status_code == request.status, answer.text
    # It passes the headers on; these would contradict what its own server sends.
    assert "transfer-encoding" not in answer.headers or "content-length" not in answer.headers
    if request.status >= 400:
        assert isinstance(answer.json()["error"], str)
    elif request.path == "/api/version":
        assert [int(part) for part in re.sub(r"^v|-.*", "", answer.json()["version"]).split(".")] > [0, 6]
    elif request.path == "/api/tags":
        for model in answer.json()["models"]:
            assert model["model"] == model["name"]
            assert ":" in model["name"]
    elif request.path == "/api/ps":
        for model in answer.json()["models"]:
            assert datetime.fromisoformat(model["expires_at"]).timestamp() > 0
    elif request.path in ("/api/pull", "/api/create"):
        for line in answer.text.splitlines():
            assert isinstance(json.loads(line), dict)


def test_replay(lmd_home: Path, hub: HubServer, tmp_path: Path) -> None:
    file = make_tiny_llama(tmp_path / "tiny.gguf")
    with managed(lmd_home, hub) as daemon, daemon.http() as client:
        answers = []
        for request in RECORDED:
            answer = _replay(client, request, file)
            _use(request, answer)
            answers.append((request, answer))

    def of(path: str, show: Callable[[Any], Any]) -> list[Any]:
        return [show(answer) for request, answer in answers if request.path == path]

    def last_line(answer: httpx.Response) -> Any:
        return json.loads(answer.text.splitlines()[-1])

    def names(answer: httpx.Response) -> set[str]:
        return {model["name"] for model in answer.json()["models"]}

    assert of("/api/pull", last_line)[0] == {"status": "success"}
    assert of("/api/pull", last_line)[1]["error"].startswith("pull model manifest: file does not exist")
    assert of("/api/create", last_line) == [{"status": "success"}] * 2
    assert of("/api/show", httpx.Response.json)[0]["system"] == "You are Mario."
    assert of("/api/tags", names) == [
        set(),
        {"hf.co/test/chat:latest", "tiny:latest", "mario:latest"},
        {"hf.co/test/chat:latest", "tiny:latest", "mario:backup"},
    ]
    assert of("/api/ps", names) == [set(), {"mario:latest"}, set()]
    unloaded = of("/api/generate", httpx.Response.json)[1]
    assert (unloaded["done"], unloaded["done_reason"]) == (True, "unload")
