"""Looking at a model at its source: what it costs, and what a source may do meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.registry.errors import (
    GgufInvalid,
    ModelNotFound,
    PullCancelled,
    SourceDenied,
    SourceInvalid,
    SourceUnavailable,
)
from lmd.registry.peek import PeekedModel
from lmd.registry.ref import parse_ref
from tests.support.gguf_file import make_gguf
from tests.support.hub import Answer, Cut, Gzip, HubFile, HubServer, NoRange, Silence, Trigger, WrongStart
from tests.support.pull_rig import Rig

REPO = "test/model"
REF = f"hf.co/{REPO}"
FILE = "model.Q4_K_M.gguf"
#: Longer than what the parser reads at once, so that the header comes in several pieces.
VOCABULARY = {f"test.text.{number}": "x" * 30_000 for number in range(30)}
DATA_BYTES = 16 << 20


@pytest.fixture(scope="module")
def content() -> bytes:
    return make_gguf(DATA_BYTES, extra={"llama.block_count": 7, **VOCABULARY})


@pytest.fixture
def hub(tmp_path: Path, content: bytes) -> Iterator[HubServer]:
    with HubServer() as server:
        server.tokens |= {"hf_good"}
        server.add_repo(REPO, {FILE: content, "params": json.dumps({"num_ctx": 8192}).encode()})
        yield server


@pytest.fixture
def rig(hub: HubServer, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(hub, tmp_path / "store")
    yield made
    made.close()


def peek(
    rig: Rig, ref: str = REF, *, token: str | None = None, cancelled: threading.Event | None = None
) -> PeekedModel:
    return rig.puller.peek(parse_ref(ref), token=token, cancelled=cancelled)


def test_one_request_brings_the_header_and_its_settings(rig: Rig, content: bytes) -> None:
    peeked = peek(rig)
    assert peeked.name == f"{REF}:latest"
    assert peeked.header.block_count == 7
    assert peeked.header.weights_bytes == DATA_BYTES
    assert peeked.parameters == {"num_ctx": 8192}
    assert peeked.download_bytes == len(content)
    (data,) = rig.hub.data_requests(FILE)
    assert "range" in data.headers
    assert rig.store.list_tags() == []


def test_the_weights_stay_at_the_source(rig: Rig) -> None:
    """What the kernel's buffers take beyond the header is all that may be sent."""
    peek(rig)
    assert rig.hub.sent_bytes(REPO, FILE) < DATA_BYTES // 2


def test_a_file_that_is_here_is_not_asked_for(rig: Rig) -> None:
    rig.pull(REF)
    before = len(rig.hub.data_requests(FILE))
    peeked = peek(rig)
    assert (peeked.header.block_count, peeked.download_bytes) == (7, 0)
    assert len(rig.hub.data_requests(FILE)) == before


def test_all_shards_count(rig: Rig) -> None:
    shards = [make_gguf(4096 * (1 + number), shard=(number, 3)) for number in range(3)]
    names = [f"big-{number + 1:05}-of-00003.gguf" for number in range(3)]
    rig.hub.add_repo("test/split", dict(zip(names, shards, strict=True)))
    peeked = peek(rig, "hf.co/test/split")
    assert peeked.header.weights_bytes == 6 * 4096
    assert peeked.download_bytes == sum(map(len, shards))


def test_a_plain_address(rig: Rig, content: bytes) -> None:
    url = rig.hub.add_plain("model.gguf", content, etag='"v1"')
    peeked = peek(rig, url)
    assert (peeked.header.block_count, peeked.download_bytes) == (7, len(content))


def test_a_local_file(rig: Rig, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(content)
    peeked = peek(rig, str(path))
    assert (peeked.header.block_count, peeked.download_bytes) == (7, 0)


def test_a_server_that_ignores_ranges_is_left_after_the_header(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, NoRange())
    assert peek(rig).header.block_count == 7
    assert rig.hub.sent_bytes(REPO, FILE) < DATA_BYTES // 2


def test_a_broken_connection_is_tried_again(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Cut(100_000), times=1)
    assert peek(rig).header.block_count == 7
    assert len(rig.hub.data_requests(FILE)) == 2


def test_a_connection_that_always_breaks_is_given_up(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Cut(100_000))
    with pytest.raises(SourceUnavailable):
        peek(rig)


def test_a_network_that_is_down_is_not_a_pull_that_failed(rig: Rig, content: bytes) -> None:
    rig.hub.add_repo(REPO, {FILE: content})
    rig.hub.stop()
    with pytest.raises(SourceUnavailable) as failed:
        peek(rig)
    assert failed.value.hint == "check the network, then try again"


def test_gated_models_need_the_callers_token(rig: Rig, content: bytes) -> None:
    repo = rig.hub.add_repo("test/gated", {FILE: content}, gated=True)
    repo.allowed.add("hf_good")
    with pytest.raises(SourceDenied):
        peek(rig, "hf.co/test/gated")
    assert peek(rig, "hf.co/test/gated", token="hf_good").header.block_count == 7
    assert not any(record.has_token for record in rig.hub.requests if record.role == "cdn")


@pytest.mark.parametrize("fault", [WrongStart(1), Gzip()], ids=["another part", "compressed"])
def test_a_reply_that_is_not_what_was_asked_for(rig: Rig, fault: WrongStart | Gzip) -> None:
    rig.hub.fault(REPO, FILE, fault)
    with pytest.raises(SourceInvalid):
        peek(rig)


def test_an_overloaded_source_is_asked_again(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Answer("data", 503), times=1)
    assert peek(rig).header.block_count == 7


def test_a_web_page_is_no_model(rig: Rig) -> None:
    rig.hub.add_repo("test/page", {"page.gguf": b"<!doctype html>" + bytes(4096)})
    with pytest.raises(GgufInvalid):
        peek(rig, "hf.co/test/page")


def test_a_header_that_never_ends_is_left(rig: Rig, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("lmd.registry.peek.MAX_HEADER_BYTES", 1 << 19)
    with pytest.raises(GgufInvalid):
        peek(rig)
    assert rig.hub.sent_bytes(REPO, FILE) <= 1 << 19


def test_an_unknown_name(rig: Rig) -> None:
    with pytest.raises(ModelNotFound):
        peek(rig, "no-such-model")


def test_hanging_up_ends_it_while_the_source_is_silent(rig: Rig) -> None:
    cancelled = threading.Event()
    rig.hub.repos[REPO].commit([HubFile.of(FILE, make_gguf(4096))])
    rig.hub.fault(REPO, FILE, Silence("data"))
    rig.hub.on_request = lambda record: cancelled.set() if record.role == "cdn" else None
    with pytest.raises(PullCancelled):
        peek(rig, cancelled=cancelled)


def test_hanging_up_ends_it_in_the_middle_of_a_header(rig: Rig) -> None:
    cancelled = threading.Event()
    rig.hub.fault(REPO, FILE, Trigger(200_000, cancelled.set))
    with pytest.raises(PullCancelled):
        peek(rig, cancelled=cancelled)
