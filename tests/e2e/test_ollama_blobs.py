"""Files that are sent to `/api/blobs`: every byte, or nothing."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.registry.digest import Digest
from tests.support.hub import HubServer
from tests.support.management import Managed, managed
from tests.support.product import wait_until
from tests.support.tiny_models import make_tiny_llama, split_model

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    with HubServer() as hub, managed(tmp_path_factory.mktemp("h"), hub) as made:
        yield made


def ingests(daemon: Managed) -> int:
    """Return how many files are on their way in."""
    return len(list(next(daemon.product.home.rglob("ingest")).iterdir()))


def begin_upload(daemon: Managed, digest: str, announced: int, sent: bytes) -> socket.socket:
    """Send the head of an upload and some of its bytes."""
    host, port = daemon.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /api/blobs/{digest} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {announced}\r\n\r\n"
    connection.sendall(head.encode() + sent)
    return connection


def test_a_file_is_stored_once(daemon: Managed) -> None:
    data = os.urandom(3_000_000)
    path = f"/api/blobs/{Digest.of(data)}"
    assert daemon.request("HEAD", path).status_code == 404
    assert daemon.request("POST", path, content=data).status_code == 201
    assert daemon.request("HEAD", path).status_code == 200
    assert daemon.request("HEAD", f"/api/blobs/sha256-{Digest.of(data).hex.upper()}").status_code == 200
    assert daemon.request("POST", path, content=data).status_code == 200
    # Nobody who has the digest has to send the bytes.
    assert daemon.request("POST", path, content=b"").status_code == 200


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 1 << 20 | 1, 5_000_000])
def test_sizes_need_not_be_announced(daemon: Managed, size: int) -> None:
    data = os.urandom(size)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), 300_007):
            yield data[start : start + 300_007]

    path = f"/api/blobs/{Digest.of(data)}"
    assert daemon.request("POST", path, content=pieces()).status_code == 201
    assert next(daemon.product.home.rglob(Digest.of(data).hex)).read_bytes() == data


def test_a_file_is_not_limited_by_what_a_request_may_have(daemon: Managed) -> None:
    data = b"\0" * (70 << 20)
    assert daemon.request("POST", f"/api/blobs/{Digest.of(data)}", content=data).status_code == 201


def test_other_bytes_than_announced_are_refused(daemon: Managed) -> None:
    expected, actual = Digest.of(b"wanted"), Digest.of(b"sent")
    answer = daemon.request("POST", f"/api/blobs/{expected}", content=b"sent")
    assert answer.status_code == 400
    assert answer.json() == {"error": f'digest mismatch, expected "{expected}", got "{actual}"'}
    for digest in (expected, actual):
        assert daemon.request("HEAD", f"/api/blobs/{digest}").status_code == 404
    assert ingests(daemon) == 0


def test_an_upload_that_is_cut_off_leaves_nothing(daemon: Managed) -> None:
    data = os.urandom(4_000_000)
    digest = str(Digest.of(data))
    connection = begin_upload(daemon, digest, len(data), data[:2_500_000])
    wait_until(lambda: ingests(daemon) > 0, "the upload has begun")
    connection.close()
    wait_until(lambda: ingests(daemon) == 0, "what came of it is gone")
    assert daemon.request("HEAD", f"/api/blobs/{digest}").status_code == 404
    assert daemon.request("POST", f"/api/blobs/{digest}", content=data).status_code == 201


def test_a_daemon_that_is_killed_meanwhile_serves_nothing_of_it(daemon: Managed) -> None:
    data = os.urandom(4_000_000)
    digest = str(Digest.of(data))
    with begin_upload(daemon, digest, len(data), data[:2_500_000]):
        wait_until(lambda: ingests(daemon) > 0, "the upload has begun")
        daemon.product.daemons[-1].kill()
    daemon.start()
    assert daemon.request("HEAD", f"/api/blobs/{digest}").status_code == 404
    assert daemon.request("POST", f"/api/blobs/{digest}", content=data).status_code == 201


def test_a_file_stays_until_a_model_is_made_of_it(daemon: Managed, tmp_path: Path) -> None:
    file = make_tiny_llama(tmp_path / "tiny.gguf")
    digest = daemon.upload(file)
    daemon.product.lm("gc", "--grace", "0")
    daemon.product.daemons[-1].stop()
    daemon.start()
    daemon.product.lm("gc", "--grace", "0")
    # A client that is told that the file is here does not send it.
    assert daemon.request("HEAD", f"/api/blobs/{digest}").status_code == 200
    body = {"model": "mine", "files": {"tiny.gguf": digest}, "stream": False}
    assert daemon.request("POST", "/api/create", body).json() == {"status": "success"}
    assert daemon.request("DELETE", "/api/delete", {"model": "mine"}).status_code == 200
    wait_until(
        lambda: not list(daemon.product.home.rglob(digest.removeprefix("sha256:"))), "its bytes went with the model"
    )


def test_shards_become_one_file(daemon: Managed, tmp_path: Path) -> None:
    shards = split_model(make_tiny_llama(tmp_path / "tiny.gguf"), 2)
    files = {shard.name: daemon.upload(shard) for shard in shards}
    answer = daemon.request("POST", "/api/create", {"model": "mine", "files": files})
    told = [json.loads(line) for line in answer.text.splitlines()]
    merging = [each for each in told if each["status"] == "merging 2 files into tiny.gguf"]
    assert merging[-1]["completed"] == merging[-1]["total"] > 0
    assert told[-1] == {"status": "success"}
    [file] = daemon.product.json("show", "mine")["files"]
    assert file["filename"] == "tiny.gguf"
