"""What Ollama's management routes say to requests that are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import HubServer
from tests.support.management import Managed, managed
from tests.support.tiny_models import make_tiny_llama

pytestmark = pytest.mark.e2e

NOBODY = "0" * 64
DEEP = b'{"model":' + b"[" * 5000 + b"]" * 5000 + b"}"
TEMPLATE_REFUSED = "template error: line 1, column 20: missing value for if"
#: Names that would be something else than a name where they are used carelessly.
HOSTILE = (
    "../../etc/passwd",
    "/etc/passwd",
    "./x.gguf",
    "a\x00b",
    "a\nb",
    "\u202emodel",
    "x" * 5000,
    "a//b",
    "a b",
    "-",
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    file = make_tiny_llama(tmp_path_factory.mktemp("file") / "tiny.gguf")
    with HubServer() as hub, managed(tmp_path_factory.mktemp("h"), hub) as made:
        made.add("mine", file)
        yield made


ERRORS: list[tuple[str, str, object, int, str]] = [
    ("POST", "/api/show", {}, 400, "model is required"),
    ("POST", "/api/show", {"model": "", "name": ""}, 400, "model is required"),
    ("POST", "/api/show", {"model": "nope"}, 404, "model 'nope:latest' not found"),
    ("POST", "/api/show", {"name": "Nope:V1"}, 404, "model 'nope:v1' not found"),
    ("POST", "/api/show", {"model": "a b"}, 400, "invalid model name"),
    ("DELETE", "/api/delete", {}, 400, 'name "" is invalid'),
    ("DELETE", "/api/delete", {"model": "a b"}, 400, 'name "a b" is invalid'),
    ("DELETE", "/api/delete", {"model": "nope"}, 404, "model 'nope' not found"),
    ("DELETE", "/api/delete", {"name": "nope:v1"}, 404, "model 'nope:v1' not found"),
    ("POST", "/api/copy", {}, 400, 'source "" is invalid'),
    ("POST", "/api/copy", {"source": "a b", "destination": "x"}, 400, 'source "a b" is invalid'),
    ("POST", "/api/copy", {"source": "mine"}, 400, 'destination "" is invalid'),
    ("POST", "/api/copy", {"source": "mine", "destination": "a b"}, 400, 'destination "a b" is invalid'),
    # What is named like a repository comes from there and from nowhere else.
    ("POST", "/api/copy", {"source": "mine", "destination": "hf.co/a/b"}, 400, 'destination "hf.co/a/b" is invalid'),
    ("POST", "/api/copy", {"source": "nope", "destination": "x"}, 404, 'model "nope" not found'),
    ("POST", "/api/pull", {}, 400, "invalid model name"),
    ("POST", "/api/pull", {"model": "a b"}, 400, "invalid model name"),
    ("POST", "/api/pull", {"model": "nope", "stream": False}, 500, "pull model manifest: file does not exist"),
    ("POST", "/api/pull", {"name": "hf.co/x/y", "stream": False}, 500, "pull model manifest: file does not exist"),
    ("POST", "/api/push", {}, 400, "model is required"),
    ("POST", "/api/push", {"model": "a b"}, 400, "invalid model name"),
    ("POST", "/api/push", {"model": "nope"}, 404, "model 'nope' not found"),
    ("POST", "/api/push", {"model": "mine"}, 501, "this daemon cannot push models"),
    ("POST", "/api/create", {}, 400, "invalid model name"),
    ("POST", "/api/create", {"model": "a b", "from": "mine"}, 400, "invalid model name"),
    ("POST", "/api/create", {"model": "new"}, 400, "neither 'from' or 'files' was specified"),
    ("POST", "/api/create", {"model": "new", "files": {}}, 400, "neither 'from' or 'files' was specified"),
    ("POST", "/api/create", {"model": "new", "files": {"x": "sha256:1"}}, 400, "invalid digest format"),
    ("POST", "/api/create", {"model": "new", "files": {"x": f"sha256:{NOBODY}"}}, 400, f"the blob sha256:{NOBODY} of"),
    (
        "POST",
        "/api/create",
        {"model": "new", "from": "mine", "template": "{{ .Prompt }}{{ if }}"},
        400,
        TEMPLATE_REFUSED,
    ),
    (
        "POST",
        "/api/create",
        {"model": "new", "from": "mine", "quantize": "q9"},
        400,
        "`q9` is no quantization",
    ),
    ("POST", "/api/create", {"model": "new", "from": "mine", "adapters": {"a": "b"}}, 400, "adapters: adapters are"),
    ("POST", "/api/create", {"model": "new", "from": "mine", "renderer": "x"}, 400, "renderer: there are no"),
    (
        "POST",
        "/api/create",
        {"model": "new", "from": "mine", "requires": "99.0.0"},
        400,
        "the model requires Ollama 99",
    ),
    ("POST", "/api/create", {"model": "new", "from": "/etc/passwd"}, 400, "from: files are not read from paths"),
    (
        "POST",
        "/api/create",
        {"model": "new", "from": "mine", "parameters": {"temperature": "hot"}},
        400,
        "parameter `temperature` must be a number from 0 to 100, not 'hot'",
    ),
    ("POST", "/api/create", {"model": "new", "from": "mine", "parameters": {"tempreature": 1}}, 400, "unknown param"),
    (
        "POST",
        "/api/create",
        {"model": "new", "from": "mine", "messages": [{"role": "boss", "content": "x"}]},
        400,
        'message role must be one of "system", "user", or "assistant"',
    ),
    ("POST", "/api/create", {"model": "new", "from": "nope", "stream": False}, 500, "pull model manifest: file does"),
    ("POST", "/api/create", {"model": "new", "from": "a b", "stream": False}, 400, "invalid model name"),
    ("POST", "/api/create", {"model": "new", "from": 7}, 400, "`from`: "),
    ("POST", "/api/create", {"model": "new", "files": ["x"]}, 400, "`files`: "),
    ("POST", "/api/show", {"model": 7}, 400, "`model`: "),
    ("POST", "/api/show", {"model": "mine", "verbose": "yes"}, 400, "`verbose`: "),
    ("POST", "/api/pull", {"model": "mine", "stream": "no"}, 400, "`stream`: "),
    ("POST", "/api/copy", ["mine", "x"], 400, "the body must be a JSON object"),
    ("DELETE", "/api/delete", "mine", 400, "the body must be a JSON object"),
    ("POST", "/api/blobs/sha256:1", None, 400, "invalid digest format"),
    ("POST", f"/api/blobs/md5:{NOBODY}", None, 400, "invalid digest format"),
    ("POST", f"/api/blobs/sha256:{NOBODY}x", None, 400, "invalid digest format"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "message"), ERRORS)
def test_errors(daemon: Managed, method: str, path: str, body: object, status: int, message: str) -> None:
    answer = daemon.request(method, path, body)
    assert (answer.status_code, set(answer.json())) == (status, {"error"})
    assert answer.json()["error"].startswith(message)
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert daemon.names() == ["mine:latest"]


@pytest.mark.parametrize("path", ["/api/show", "/api/copy", "/api/pull", "/api/push", "/api/create", "/api/delete"])
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "missing request body"),
        (b"  ", 400, "missing request body"),
        (b"{", 400, "the body is not JSON"),
        (b'{"model": "mine"} {}', 400, "the body is not JSON"),
        (b'{"model": "mine", "model": "other"}', 400, "the body names the key 'model' twice"),
        (b'{"model": NaN}', 400, "the body is not JSON"),
        (b'{"model": "\xff"}', 400, "the body is not UTF-8"),
        (DEEP, 400, "the body is nested more than"),
        (b"null", 400, "the body must be a JSON object"),
        (b" " * (65 << 20), 413, "the body is larger than"),
    ],
    ids=["empty", "blank", "cut", "two", "twice", "nan", "latin-1", "deep", "null", "large"],
)
def test_bodies_that_are_no_request(daemon: Managed, path: str, body: bytes, status: int, message: str) -> None:
    answer = daemon.request("DELETE" if path == "/api/delete" else "POST", path, content=body)
    assert answer.status_code == status
    assert answer.json()["error"].startswith(message)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        ("POST", "/api/version"),
        ("DELETE", "/api/tags"),
        ("POST", "/api/ps"),
        ("GET", "/api/show"),
        ("PUT", "/api/pull"),
        ("GET", "/api/push"),
        ("GET", "/api/create"),
        ("PUT", "/api/copy"),
        ("POST", "/api/delete"),
        ("GET", f"/api/blobs/sha256:{NOBODY}"),
        ("PUT", f"/api/blobs/sha256:{NOBODY}"),
    ],
)
def test_verbs_that_a_path_does_not_have(daemon: Managed, method: str, path: str) -> None:
    answer = daemon.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_no_names(daemon: Managed, name: str) -> None:
    for method, path, body in (
        ("POST", "/api/show", {"model": name}),
        ("POST", "/api/copy", {"source": name, "destination": "new"}),
        ("POST", "/api/copy", {"source": "mine", "destination": name}),
        ("POST", "/api/pull", {"model": name}),
        ("POST", "/api/push", {"model": name}),
        ("POST", "/api/create", {"model": name, "from": "mine"}),
        ("DELETE", "/api/delete", {"model": name}),
    ):
        answer = daemon.request(method, path, body)
        assert (answer.status_code, set(answer.json())) == (400, {"error"}), (method, path)
        assert len(answer.content) < 1000
    assert daemon.names() == ["mine:latest"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.gguf", "a/../b", "./x.gguf", "", "a//b", "%2e%2e/x"])
def test_files_have_plain_relative_names(daemon: Managed, name: str) -> None:
    body = {"model": "new", "files": {name: f"sha256:{NOBODY}"}}
    answer = daemon.request("POST", "/api/create", body)
    assert (answer.status_code, answer.json()) == (400, {"error": "file path must be relative"})


@pytest.mark.parametrize(
    ("digest", "status"),
    [
        (f"sha256:{NOBODY}", 404),
        (f"sha256-{NOBODY}", 404),
        (f"SHA256:{NOBODY}", 400),
        ("sha256:", 400),
        ("..", 404),
        ("..%2F..%2Findex.db", 404),
        ("sha256:..%2F" + "0" * 61, 404),
        (f"sha256:{'g' * 64}", 400),
        (f"sha256:{NOBODY}%0a", 400),
    ],
)
def test_digests_are_hashes_and_nothing_else(daemon: Managed, digest: str, status: int) -> None:
    assert daemon.request("HEAD", f"/api/blobs/{digest}").status_code == status


def test_errors_of_a_create_that_has_begun_are_lines(daemon: Managed, tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"no model at all")
    digest = daemon.upload(tmp_path / "no.gguf")
    *steps, last = daemon.steps("/api/create", {"model": "new", "files": {"no.gguf": digest}})
    assert steps[0] == {"status": "parsing GGUF"}
    assert set(last) == {"error"}
    assert "not a valid GGUF file" in last["error"]
    answer = daemon.request("POST", "/api/create", {"model": "new", "files": {"no.gguf": digest}, "stream": False})
    assert (answer.status_code, answer.json()) == (400, last)


def test_errors_hold_one_line_of_json(daemon: Managed) -> None:
    """A name is shown as it came; it must not break out of the message."""
    name = 'x"},\n{"status":"success'
    answer = daemon.request("DELETE", "/api/delete", {"model": name})
    assert answer.text.count("\n") == 0
    assert json.loads(answer.text) == {"error": f'name "{name}" is invalid'}
