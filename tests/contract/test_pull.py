"""What a pull promises, against a real Hub that does what Hubs, CDNs and attackers do."""

from __future__ import annotations

import gzip
import json
import logging
import resource
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lmd.registry.errors import (
    DigestMismatch,
    DiskFull,
    GgufInvalid,
    InvalidRequest,
    LmdError,
    ModelNotFound,
    PullCancelled,
    SourceDenied,
    SourceInvalid,
    SourceNotFound,
    SourceRateLimited,
    SourceUnavailable,
)
from lmd.registry.pull import PullEvent, PullState
from lmd.registry.ref import HubRef, NameRef
from lmd.registry.store import TagRecord
from tests.support.gguf_file import make_gguf
from tests.support.hub import (
    Answer,
    Corrupt,
    Cut,
    Drip,
    Expire,
    Gzip,
    HubFile,
    HubServer,
    Lie,
    NoRange,
    Redirect,
    RequestRecord,
    Resize,
    Silence,
    Stall,
    Trigger,
    WrongStart,
)
from tests.support.hub.faults import Fault, Stage
from tests.support.hub.proxy import ForwardProxy
from tests.support.pull_rig import QUICK, Rig, sha256_of

REPO = "test/model"
REF = f"hf.co/{REPO}"
NAME = f"{REF}:latest"
FILE = "model.Q4_K_M.gguf"
MODEL = make_gguf(3 << 20)
DEADLINE_S = 20.0
#: As on a link where one connection is as fast as the hash.
ONE_CONNECTION = replace(QUICK, join_after_s=3600.0)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    path = tmp_path / FILE
    path.write_bytes(MODEL)
    with HubServer() as server:
        server.tokens |= {"hf_good", "hf_other"}
        server.add_repo(REPO, {FILE: path, "LICENSE": b"Do as you like.\n", "README.md": b"# Model\n"})
        yield server


@pytest.fixture
def rig(hub: HubServer, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(hub, tmp_path / "store")
    yield made
    made.close()


def assert_stored(rig: Rig, name: str = NAME, content: bytes = MODEL) -> None:
    tag = rig.store.get_tag(name)
    assert tag is not None
    layer = rig.store.get_manifest(tag.manifest).weights[0]
    assert str(layer.digest) == sha256_of(content)
    assert rig.store.blob_path(layer.digest).read_bytes() == content


def assert_nothing_stored(rig: Rig) -> None:
    assert rig.store.list_tags() == []
    assert list((rig.store.root / "blobs" / "sha256").iterdir()) == []


# What works


def test_a_fresh_pull(rig: Rig) -> None:
    tag = rig.pull(REF)

    assert tag.name == NAME
    assert_stored(rig)
    manifest = rig.store.get_manifest(tag.manifest)
    assert manifest.lm.origin.ref == f"{REF}:Q4_K_M"
    assert manifest.lm.origin.commit == rig.hub.repos[REPO].head
    assert manifest.lm.licenses == ("mit", "Do as you like.")
    # Progress is a state, not a history: a short step between two looks may go unseen.
    seen = rig.states()
    assert seen[0] is PullState.RESOLVING
    assert seen[-1] is PullState.DONE
    assert set(seen[1:-1]) <= {PullState.DOWNLOADING, PullState.COMMITTING}
    last = rig.events[-1]
    assert last == PullEvent(sha256_of(MODEL), FILE, len(MODEL), len(MODEL), PullState.DONE)
    progress = [event.completed_bytes for event in rig.events if event.state is PullState.DOWNLOADING]
    assert progress == sorted(progress)


def test_several_connections_share_one_file(rig: Rig) -> None:
    rig.pull(REF)
    ranges = sorted(r.byte_range for r in rig.hub.data_requests(FILE) if r.byte_range is not None)
    assert len(ranges) > 4
    assert ranges[0][0] == 0
    assert max(end for _, end in ranges) == len(MODEL)


def test_one_connection_is_enough_when_it_is_fast(hub: HubServer, tmp_path: Path) -> None:
    rig = Rig(hub, tmp_path / "store", ONE_CONNECTION)
    try:
        rig.pull(REF)
        assert len(hub.data_requests(FILE)) == 1
        assert_stored(rig)
    finally:
        rig.close()


def test_an_unchanged_model_costs_one_question_and_no_byte(rig: Rig) -> None:
    first = rig.pull(REF)
    rig.hub.requests.clear()
    rig.events.clear()

    second = rig.pull(REF)

    assert second.manifest == first.manifest
    assert [r for r in rig.hub.requests if r.path.endswith(".gguf")] == []
    assert rig.states() == [PullState.RESOLVING, PullState.PRESENT]


def test_the_plan_fetches_nothing(rig: Rig) -> None:
    plan = rig.puller.resolve(HubRef("test", "model"))
    assert (plan.name, plan.origin, plan.commit) == (NAME, f"{REF}:Q4_K_M", rig.hub.repos[REPO].head)
    assert [(file.filename, file.role, file.size_bytes) for file in plan.files] == [(FILE, "weights", len(MODEL))]
    assert {request.role for request in rig.hub.requests} == {"hub"}


def test_sixty_shards(rig: Rig) -> None:
    shards = {f"big-{n:05}-of-00060.gguf": make_gguf(64, seed=n, shard=(n - 1, 60)) for n in range(1, 61)}
    rig.hub.add_repo("test/big", shards)
    tag = rig.pull("hf.co/test/big")
    weights = rig.store.get_manifest(tag.manifest).weights
    assert [layer.filename for layer in weights] == sorted(shards)


def test_a_missing_shard_is_noticed_before_the_first_byte(rig: Rig) -> None:
    shards = {f"big-{n:05}-of-00060.gguf": make_gguf(64, seed=n, shard=(n - 1, 60)) for n in range(1, 61) if n != 33}
    rig.hub.add_repo("test/big", shards)
    with pytest.raises(SourceInvalid, match="33"):
        rig.pull("hf.co/test/big")
    assert {request.role for request in rig.hub.requests} == {"hub"}
    assert_nothing_stored(rig)


def test_a_projector_is_noticed_and_fetched_only_when_asked_for(hub: HubServer, tmp_path: Path) -> None:
    projector = make_gguf(64, seed=9, extra={"general.type": "mmproj"})
    hub.add_repo("test/seeing", {"m-Q4_K_M.gguf": MODEL, "mmproj-m-f16.gguf": projector})
    for wanted in (False, True):
        rig = Rig(hub, tmp_path / f"store-{wanted}", replace(QUICK, with_projector=wanted))
        try:
            plan = rig.puller.resolve(HubRef("test", "seeing"))
            assert plan.projector == (None if wanted else "mmproj-m-f16.gguf")
            tag = rig.pull("hf.co/test/seeing")
            found = rig.store.get_manifest(tag.manifest).projector
            assert (found is not None) is wanted
        finally:
            rig.close()


def test_system_and_params_of_the_repository_are_honoured(rig: Rig) -> None:
    params = json.dumps({"temperature": 0.25, "stop": ["<end>"], "no_such_thing": 1, "top_p": 7}).encode()
    files = {FILE: MODEL, "system": b"Be brief.\n", "params": params, "template": b"{{ .Prompt }}"}
    rig.hub.add_repo("test/ollama", files)
    lm = rig.store.get_manifest(rig.pull("hf.co/test/ollama").manifest).lm
    assert lm.system == "Be brief."
    assert dict(lm.parameters) == {"temperature": 0.25, "stop": ("<end>",)}
    assert lm.template is None


@pytest.mark.parametrize("params", [b"not json", b"[1]", b"[" * 100_000, b"\xff\xfe\xfd"])
def test_unusable_params_are_left_out(rig: Rig, params: bytes) -> None:
    rig.hub.add_repo("test/ollama", {FILE: MODEL, "params": params, "system": b"\xff"})
    lm = rig.store.get_manifest(rig.pull("hf.co/test/ollama").manifest).lm
    assert dict(lm.parameters) == {}
    assert lm.system is None


def test_a_short_name_is_an_alias(rig: Rig) -> None:
    repo = rig.aliases.resolve(NameRef("tinyllama"))
    assert repo is not None
    rig.hub.add_repo(repo.repo_id, {FILE: MODEL})
    tag = rig.pull("tinyllama")
    assert tag.name == "tinyllama:latest"
    assert rig.store.get_manifest(tag.manifest).lm.origin.ref == f"hf.co/{repo.repo_id}:Q4_K_M"


def test_an_unknown_name_comes_with_close_ones(rig: Rig) -> None:
    with pytest.raises(ModelNotFound) as caught:
        rig.pull("tinylama")
    assert "tinyllama" in caught.value.suggestions
    with pytest.raises(ModelNotFound) as caught:
        rig.pull("zzzzzzzzzzzz-qqqq")
    assert "hf.co/" in caught.value.hint
    assert rig.hub.requests == []


def test_an_endpoint_below_a_path(tmp_path: Path) -> None:
    with HubServer(prefix="/mirror/hub") as hub:
        hub.add_repo(REPO, {FILE: MODEL})
        rig = Rig(hub, tmp_path / "store")
        try:
            rig.pull(REF)
            assert_stored(rig)
        finally:
            rig.close()


def test_the_commit_is_pinned_when_the_repository_moves_meanwhile(rig: Rig) -> None:
    repo = rig.hub.repos[REPO]
    old = repo.head

    def push(record: RequestRecord) -> None:
        """Somebody pushes between the API's answer and the first request for bytes."""
        if "/resolve/" in record.path and repo.head == old:
            repo.commit([HubFile.of(FILE, make_gguf(4096, seed=77))])

    rig.hub.on_request = push
    tag = rig.pull(REF)
    assert repo.head != old
    assert rig.store.get_manifest(tag.manifest).lm.origin.commit == old
    assert_stored(rig)
    assert all(old in r.path for r in rig.hub.requests if "/resolve/" in r.path)


# Tokens


def test_a_gated_repository(rig: Rig) -> None:
    repo = rig.hub.repos[REPO]
    repo.gated = True
    with pytest.raises(SourceDenied) as caught:
        rig.pull(REF)
    assert "HF_TOKEN" in caught.value.hint
    assert f"{rig.hub.endpoint}/{REPO}" in caught.value.hint
    with pytest.raises(SourceDenied, match="no access"):
        rig.pull(REF, token="hf_good")
    assert_nothing_stored(rig)

    repo.allowed.add("hf_good")
    rig.pull(REF, token="hf_good")
    assert_stored(rig)


def test_the_token_goes_to_the_endpoint_and_never_to_the_cdn(rig: Rig) -> None:
    rig.hub.repos[REPO].private = True
    rig.hub.repos[REPO].allowed.add("hf_good")
    rig.pull(REF, token="hf_good")
    assert all(r.has_token for r in rig.hub.requests if r.role == "hub")
    at_cdn = [r for r in rig.hub.requests if r.role == "cdn"]
    assert at_cdn
    assert not any(r.has_token for r in at_cdn)
    assert not any("hf_good" in f"{r.headers} {r.query}" for r in at_cdn)


def test_a_private_repository_looks_like_none(rig: Rig) -> None:
    rig.hub.repos[REPO].private = True
    with pytest.raises(SourceNotFound, match="private") as caught:
        rig.pull(REF)
    assert "HF_TOKEN" in caught.value.hint
    with pytest.raises(SourceNotFound) as caught:
        rig.pull(REF, token="hf_other")
    assert "HF_TOKEN" in caught.value.hint, "the token may be the wrong one"


def test_a_bad_token_is_said_to_be_bad(rig: Rig) -> None:
    with pytest.raises(SourceDenied, match="token"):
        rig.pull(REF, token="hf_expired")
    with pytest.raises(InvalidRequest) as refused:
        rig.pull(REF, token="two\r\nlines")
    assert "HF_TOKEN" in refused.value.hint
    assert_nothing_stored(rig)


def test_no_repository_and_no_file(rig: Rig) -> None:
    with pytest.raises(SourceNotFound):
        rig.pull("hf.co/test/nothing")
    with pytest.raises(SourceNotFound, match="Q8_0"):
        rig.pull(f"{REF}:Q8_0")


def test_nothing_secret_is_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    rig.hub.repos[REPO].allowed.add("hf_good")
    rig.hub.repos[REPO].gated = True
    rig.hub.fault(REPO, FILE, Cut(150_000), times=2)
    rig.pull(REF, token="hf_good")
    assert "next try" in caplog.text
    assert "hf_good" not in caplog.text
    assert "X-Signature" not in caplog.text


# Broken connections


@pytest.mark.parametrize("reset", [False, True])
def test_cuts_cost_only_what_was_under_way(rig: Rig, reset: bool) -> None:
    rig.hub.fault(REPO, FILE, Cut(150_000, reset=reset), times=20)
    rig.pull(REF)
    assert_stored(rig)
    assert PullState.RETRYING in rig.states()
    again = sum(r.sent_bytes for r in rig.hub.data_requests(FILE)) - len(MODEL)
    if not reset:
        # An orderly close delivers what was sent; a reset may not.
        assert again == 0


def test_a_link_that_always_dies_still_gets_there(rig: Rig) -> None:
    """More failures than the budget has: only failures without progress count."""
    rig.hub.fault(REPO, FILE, Cut(100_000))
    rig.pull(REF)
    assert_stored(rig)
    assert len(rig.hub.data_requests(FILE)) > 20


def test_no_progress_is_given_up(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Cut(0))
    with pytest.raises(SourceUnavailable) as caught:
        rig.pull(REF)
    assert caught.value.hint
    assert_nothing_stored(rig)


def test_a_stalled_connection_is_dropped(hub: HubServer, tmp_path: Path) -> None:
    rig = Rig(hub, tmp_path / "store", replace(QUICK, stall_timeout_s=0.2))
    try:
        hub.fault(REPO, FILE, Stall(50_000), times=3)
        rig.pull(REF)
        assert_stored(rig)
    finally:
        rig.close()


def test_a_slow_drip_does_not_count_as_progress(hub: HubServer, tmp_path: Path) -> None:
    rig = Rig(hub, tmp_path / "store", replace(QUICK, stall_timeout_s=0.1, min_rate_bytes_per_s=1000))
    try:
        hub.fault(REPO, FILE, Drip(100))
        with pytest.raises(SourceUnavailable, match="bytes a second"):
            rig.pull(REF)
        assert_nothing_stored(rig)
    finally:
        rig.close()


@pytest.mark.parametrize("stage", ["api", "resolve", "data"])
def test_a_storm_of_server_errors_passes(rig: Rig, stage: Stage) -> None:
    rig.hub.fault(REPO, None, Answer(stage, 503), times=3)
    rig.pull(REF)
    assert_stored(rig)
    assert any("503" in event.detail for event in rig.events if event.state is PullState.RETRYING)


@pytest.mark.parametrize("stage", ["api", "resolve", "data"])
def test_server_errors_without_end_are_given_up(rig: Rig, stage: Stage) -> None:
    rig.hub.fault(REPO, None, Answer(stage, 502))
    with pytest.raises(SourceUnavailable, match="502"):
        rig.pull(REF)
    assert_nothing_stored(rig)


@pytest.mark.parametrize(
    "headers",
    [{"RateLimit": '"resolvers";r=0;t=0'}, {"Retry-After": "0"}, {}],
    ids=["RateLimit", "Retry-After", "neither"],
)
@pytest.mark.parametrize("stage", ["api", "resolve", "data"])
def test_a_short_rate_limit_is_waited_for(rig: Rig, stage: Stage, headers: dict[str, str]) -> None:
    rig.hub.fault(REPO, None, Answer(stage, 429, headers), times=2)
    rig.pull(REF)
    assert_stored(rig)
    assert any("slow down" in event.detail for event in rig.events)


@pytest.mark.parametrize("headers", [{"RateLimit": '"api";r=0;t=250'}, {"Retry-After": "250"}])
@pytest.mark.parametrize("stage", ["api", "resolve"])
def test_a_long_rate_limit_is_an_error_that_says_how_long(rig: Rig, stage: Stage, headers: dict[str, str]) -> None:
    rig.hub.fault(REPO, None, Answer(stage, 429, headers))
    with pytest.raises(SourceRateLimited, match="250") as caught:
        rig.pull(REF)
    assert caught.value.retry_after_s == 250


def test_expired_signatures_are_renewed_in_the_middle(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Expire(1_000_000))
    rig.hub.fault(REPO, FILE, Expire(2_000_000))
    rig.pull(REF)
    assert_stored(rig)
    assert any(r.status == 403 for r in rig.hub.requests if r.role == "cdn")


def test_no_network(rig: Rig) -> None:
    rig.hub.stop()
    with pytest.raises(SourceUnavailable) as caught:
        rig.pull(REF)
    assert "network" in caught.value.hint


# Servers without ranges, or with strange ones


def test_a_server_without_ranges(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, NoRange())
    rig.pull(REF)
    assert_stored(rig)


def test_a_server_without_ranges_that_breaks_off_is_read_again_from_the_start(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, NoRange())
    rig.hub.fault(REPO, FILE, Cut(1_000_000), times=1)
    rig.hub.fault(REPO, FILE, Cut(2_000_000), times=1)
    rig.pull(REF)
    assert_stored(rig)


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(rig: Rig) -> None:
    """Bytes received again are no progress, or this would go on for ever."""
    rig.hub.fault(REPO, FILE, NoRange())
    rig.hub.fault(REPO, FILE, Cut(1_000_000))
    with pytest.raises(SourceUnavailable):
        rig.pull(REF)
    assert_nothing_stored(rig)


def test_ranges_that_stop_working_in_the_middle(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Trigger(1_000_000, lambda: rig.hub.fault(REPO, FILE, NoRange())))
    rig.pull(REF)
    assert_stored(rig)


@pytest.mark.parametrize(
    "fault",
    [WrongStart(10), WrongStart(-1), Resize(5), Resize(-5), Resize(-(2 << 20)), Gzip()],
    ids=["later", "earlier", "longer", "shorter", "much-shorter", "gzip"],
)
def test_a_reply_that_does_not_fit_is_refused(rig: Rig, fault: Fault) -> None:
    # The first ranges are right, so that there is something to go wrong.
    rig.hub.fault(REPO, FILE, Trigger(300_000, lambda: rig.hub.fault(REPO, FILE, fault)))
    with pytest.raises(SourceInvalid) as caught:
        rig.pull(REF)
    assert caught.value.metadata["ref"] == NAME
    assert_nothing_stored(rig)


@pytest.mark.parametrize("delta", [5, -5])
def test_another_size_without_ranges_is_refused(rig: Rig, delta: int) -> None:
    rig.hub.fault(REPO, FILE, NoRange())
    rig.hub.fault(REPO, FILE, Resize(delta))
    with pytest.raises(SourceInvalid, match=str(len(MODEL) + delta)):
        rig.pull(REF)
    assert_nothing_stored(rig)


def test_416_is_a_file_that_is_too_short(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Answer("data", 416, {"Content-Range": "bytes */10"}))
    with pytest.raises(SourceInvalid, match="shorter"):
        rig.pull(REF)
    assert_nothing_stored(rig)


# Lies


@pytest.mark.parametrize("offset", [40, len(MODEL) // 2, len(MODEL) - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_corrupt_byte_is_noticed(rig: Rig, offset: int, ranges: bool) -> None:
    if not ranges:
        rig.hub.fault(REPO, FILE, NoRange())
    rig.hub.fault(REPO, FILE, Corrupt(offset))
    with pytest.raises(DigestMismatch) as caught:
        rig.pull(REF)
    assert caught.value.metadata["expected"] == sha256_of(MODEL)
    assert_nothing_stored(rig)
    assert list((rig.store.root / "ingest").iterdir()) == []

    rig.hub.faults.clear()
    rig.pull(REF)
    assert_stored(rig)


def test_two_digests_for_one_file_are_refused(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Lie(sha256="0" * 64))
    with pytest.raises(SourceInvalid, match="two digests"):
        rig.pull(REF)
    assert_nothing_stored(rig)


def test_two_sizes_for_one_file_are_refused(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Lie(size_bytes=17))
    with pytest.raises(SourceInvalid, match="17"):
        rig.pull(REF)
    assert_nothing_stored(rig)


def test_a_lie_about_the_digest_everywhere_is_a_mismatch(rig: Rig) -> None:
    rig.hub.repos[REPO].commits[rig.hub.repos[REPO].head][FILE].sha256 = "0" * 64
    with pytest.raises(DigestMismatch):
        rig.pull(REF)
    assert_nothing_stored(rig)


def test_a_missing_linked_etag_does_not_matter_when_the_api_has_the_digest(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Lie(no_etag=True))
    rig.pull(REF)
    assert_stored(rig)


def api_answer(rig: Rig, **changes: object) -> Answer:
    described = rig.hub.repos[REPO].describe("main", blobs=True)
    assert described is not None
    return Answer("api", 200, {"Content-Type": "application/json"}, json.dumps(described | changes).encode())


def test_an_api_without_blob_facts_is_completed_by_headers(rig: Rig) -> None:
    """Some mirrors ignore `blobs=true`."""
    rig.hub.fault(REPO, None, api_answer(rig, siblings=[{"rfilename": FILE}]))
    rig.pull(REF)
    assert_stored(rig)
    assert any(event.digest == sha256_of(MODEL) for event in rig.events)


def test_weights_without_any_digest_are_hashed_and_remembered(rig: Rig) -> None:
    rig.hub.fault(REPO, None, api_answer(rig, siblings=[{"rfilename": FILE}]))
    rig.hub.fault(REPO, FILE, Lie(no_etag=True))
    rig.pull(REF)
    assert_stored(rig)


def test_small_weights_are_verified_by_their_git_id(rig: Rig) -> None:
    tiny = make_gguf(64, seed=5)
    repo = rig.hub.add_repo("test/tiny", {})
    repo.commit([HubFile.of("tiny.gguf", tiny, lfs=False)])
    rig.pull("hf.co/test/tiny")
    assert_stored(rig, "hf.co/test/tiny:latest", tiny)
    rig.hub.requests.clear()
    rig.pull("hf.co/test/tiny")
    assert rig.hub.data_requests("tiny.gguf") == []

    other = make_gguf(64, seed=6)
    repo.commit([HubFile.of("tiny.gguf", other, lfs=False)])
    rig.hub.fault("test/tiny", "tiny.gguf", Corrupt(len(other) - 1))
    with pytest.raises(DigestMismatch, match="git:"):
        rig.pull("hf.co/test/tiny")


def test_a_tampered_licence_is_noticed(rig: Rig) -> None:
    rig.hub.fault(REPO, "LICENSE", Corrupt(3))
    with pytest.raises(DigestMismatch, match="LICENSE"):
        rig.pull(REF)
    assert rig.store.list_tags() == []


HOSTILE_NAMES = [
    "../../x.gguf",
    "a/../../x.gguf",
    "/etc/x.gguf",
    "a\\b.gguf",
    "a\0b.gguf",
    "a\nb.gguf",
    "x" * 300 + ".gguf",
    "a\u202eb.gguf",
    "%2e%2e/x.gguf",
    "%2e%2e%2fx.gguf",
    "a//b.gguf",
    ".",
    "..",
    "",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=[ascii(name[:20]) for name in HOSTILE_NAMES])
def test_hostile_file_names_are_refused_before_any_request(rig: Rig, name: str) -> None:
    entry = {"rfilename": name, "size": 10, "blobId": "0" * 40, "lfs": None}
    described = rig.hub.repos[REPO].describe("main", blobs=True)
    assert described is not None
    siblings = described["siblings"]
    assert isinstance(siblings, list)
    rig.hub.fault(REPO, None, api_answer(rig, siblings=[entry, *siblings]))
    with pytest.raises(SourceInvalid):
        rig.pull(REF, token="hf_good")
    assert [r.path for r in rig.hub.requests] == [f"/api/models/{REPO}"]
    assert_nothing_stored(rig)


@pytest.mark.parametrize(
    "changes",
    [
        {"sha": None},
        {"sha": "../../x"},
        {"sha": 5},
        {"siblings": [{"size": 1}]},
        {"siblings": {"a": 1}},
        {"siblings": [{"rfilename": 5}]},
        {"siblings": [{"rfilename": "a.gguf", "size": -1}]},
        {"siblings": [{"rfilename": "a.gguf", "size": 1e300}]},
        {"siblings": [{"rfilename": "a.gguf", "lfs": {"size": 1, "sha256": "../x", "pointerSize": 1}}]},
        {"siblings": [{"rfilename": "a.gguf", "lfs": {"size": True, "sha256": "0" * 64, "pointerSize": 1}}]},
        {"siblings": [{"rfilename": "a.gguf", "blobId": "zz", "size": 1}]},
        {"siblings": [None]},
        {"lastModified": {"$date": 1}},
        {"inferenceProviderMapping": 5},
    ],
    ids=str,
)
def test_nonsense_from_the_api_is_a_typed_error(rig: Rig, changes: dict[str, object]) -> None:
    rig.hub.fault(REPO, None, api_answer(rig, **changes))
    with pytest.raises(SourceInvalid):
        rig.pull(REF)
    assert_nothing_stored(rig)


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{", b"<html>", b"[" * 200_000, b'{"id": "x"}'])
def test_replies_that_are_no_description_are_typed_errors(rig: Rig, body: bytes) -> None:
    rig.hub.fault(REPO, None, Answer("api", 200, {}, body))
    with pytest.raises(SourceInvalid):
        rig.pull(REF)


def test_a_compressed_bomb_is_refused_unopened(rig: Rig) -> None:
    bomb = gzip.compress(b'{"id": "x", "siblings": [' + b"{}," * (100 << 20) + b"{}]}", compresslevel=1)
    rig.hub.fault(REPO, None, Answer("api", 200, {"Content-Encoding": "gzip"}, bomb))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceInvalid, match="compressed"):
        rig.pull(REF)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


@pytest.mark.parametrize("announced", [True, False])
def test_an_endless_description_is_cut_off(rig: Rig, announced: bool) -> None:
    body = b" " * (33 << 20)
    headers = {} if announced else {"Content-Length": str(32 << 20), "Connection": "close"}
    rig.hub.fault(REPO, None, Answer("api", 200, headers, body))
    with pytest.raises(SourceInvalid):
        rig.pull(REF)


# Redirects


@pytest.mark.parametrize(
    "location",
    [
        "{self}",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://127.0.0.1:70/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]/x",
        "http://[::ffff:169.254.169.254]/x",
        "http://0.0.0.0:1/x",
        "http://user:pw@127.0.0.2/x",
        "//",
        "http://",
    ],
)
def test_redirects_that_lead_astray_are_refused(rig: Rig, location: str) -> None:
    rig.hub.fault(REPO, FILE, Redirect(location))
    with pytest.raises(SourceInvalid):
        rig.pull(REF, token="hf_good")
    assert_nothing_stored(rig)


def test_the_token_does_not_follow_a_redirect_of_the_endpoint(rig: Rig) -> None:
    rig.hub.fault(REPO, FILE, Redirect(f"{rig.hub.cdn}/elsewhere"))
    with pytest.raises(LmdError):
        rig.pull(REF, token="hf_good")
    assert not any(r.has_token for r in rig.hub.requests if r.role == "cdn")


def test_the_api_may_not_redirect_to_another_server(rig: Rig) -> None:
    rig.hub.fault(REPO, None, Answer("api", 302, {"Location": f"{rig.hub.cdn}/api/models/{REPO}"}))
    with pytest.raises(SourceInvalid, match="another server"):
        rig.pull(REF, token="hf_good")
    assert not any(r.role == "cdn" for r in rig.hub.requests)


def test_a_renamed_repository_is_followed(rig: Rig) -> None:
    moved = {"Location": f"/api/models/{REPO}?blobs=true"}
    rig.hub.fault("old/name", None, Answer("api", 307, moved))
    head = rig.hub.repos[REPO].head
    for filename in (FILE, "LICENSE"):
        where = {"Location": f"/{REPO}/resolve/{head}/{filename}"}
        rig.hub.fault("old/name", filename, Answer("resolve", 307, where))
    rig.pull("hf.co/old/name")
    assert_stored(rig, "hf.co/old/name:latest")


# TLS and proxies


def test_https_with_a_trusted_and_an_untrusted_certificate(
    tls_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tls_files
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    path = tmp_path / FILE
    path.write_bytes(MODEL)
    with HubServer(tls=context) as hub, HubServer() as plain:
        hub.add_repo(REPO, {FILE: path})
        plain_url = plain.add_plain(FILE, path)
        stranger = Rig(hub, tmp_path / "a")
        try:
            with pytest.raises(SourceInvalid, match="certificate"):
                stranger.pull(REF)
        finally:
            stranger.close()

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        rig = Rig(hub, tmp_path / "b")
        try:
            hub.fault(REPO, FILE, Cut(300_000), times=3)
            rig.pull(REF)
            assert_stored(rig)

            hub.fault("test/down", None, Redirect(plain_url))
            hub.add_repo("test/down", {FILE: make_gguf(64, seed=3)})
            with pytest.raises(SourceInvalid, match="from https to http"):
                rig.pull("hf.co/test/down")
            assert plain.requests == []

            # Through a tunnel of a proxy that asks for a password.
            with ForwardProxy(user="me", password="p w") as proxy:
                hub.add_repo("test/far", {FILE: make_gguf(64, seed=4)})
                rig.puller = rig.new_puller(replace(QUICK, proxies={"https": proxy.url.replace(" ", "%20")}))
                rig.pull("hf.co/test/far")
                assert all(":" in target and "/" not in target for target in proxy.targets)
                assert len(proxy.targets) >= 2
        finally:
            rig.close()


def test_plain_http_through_a_proxy(hub: HubServer, tmp_path: Path) -> None:
    with ForwardProxy() as proxy:
        rig = Rig(hub, tmp_path / "store", replace(QUICK, proxies={"http": proxy.url}))
        try:
            rig.pull(REF)
            assert_stored(rig)
            assert any(target.startswith(hub.cdn) for target in proxy.targets)
            proxy.targets.clear()
            rig.puller = rig.new_puller(replace(QUICK, proxies={"http": proxy.url, "no": "127.0.0.1,127.0.0.2"}))
            rig.pull(REF)
            assert proxy.targets == []
        finally:
            rig.close()


# Room on the disk


def test_a_model_that_does_not_fit_is_refused_before_the_first_byte(rig: Rig) -> None:
    rig.hub.repos[REPO].commits[rig.hub.repos[REPO].head][FILE].size_bytes = 1 << 60
    with pytest.raises(DiskFull) as caught:
        rig.pull(REF)
    assert caught.value.needed_bytes == 1 << 60
    assert rig.hub.data_requests(FILE) == []
    assert_nothing_stored(rig)
    assert rig.store.usage().ingests == 0, "an empty ingest once stayed, and `lm gc` listed it"


def test_shards_that_do_not_fit_together_are_refused_before_the_first_byte(rig: Rig) -> None:
    free = shutil.disk_usage(rig.store.root).free
    shards = {f"big-{n:05}-of-00003.gguf": make_gguf(64, seed=n, shard=(n - 1, 3)) for n in range(1, 4)}
    repo = rig.hub.add_repo("test/big", shards)
    for file in repo.commits[repo.head].values():
        file.size_bytes = free // 2
    with pytest.raises(DiskFull):
        rig.pull("hf.co/test/big")
    assert {request.role for request in rig.hub.requests} == {"hub"}
    assert rig.store.usage().ingests == 0
    # Nothing stays reserved.
    with rig.store.reserve(free // 2, "test"):
        pass


# Resume


def test_a_cancelled_pull_resumes_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    rig = Rig(hub, tmp_path / "store", ONE_CONNECTION)
    cancelled = threading.Event()
    hub.fault(REPO, FILE, Stall(100_000))

    def stop(event: PullEvent) -> None:
        if event.completed_bytes > 0:
            cancelled.set()

    try:
        with pytest.raises(PullCancelled):
            rig.pull(REF, cancelled=cancelled, on_event=stop)
        hub.faults.clear()
        hub.requests.clear()
        rig.events.clear()

        rig.pull(REF)

        assert_stored(rig)
        resumed = max(event.resumed_bytes for event in rig.events)
        assert resumed > 0
        assert [r.byte_range for r in hub.data_requests(FILE)] == [(resumed, len(MODEL))]
    finally:
        rig.close()


def test_a_damaged_part_is_fetched_again(rig: Rig) -> None:
    cancelled = threading.Event()
    rig.hub.fault(REPO, FILE, Stall(100_000))
    with pytest.raises(PullCancelled):
        rig.pull(REF, cancelled=cancelled, on_event=lambda e: cancelled.set() if e.completed_bytes else None)
    rig.hub.faults.clear()
    part = next(path for path in (rig.store.root / "ingest").iterdir() if path.stat().st_size >= 100_000)
    damaged = bytearray(part.read_bytes())
    damaged[50_000] ^= 1
    part.write_bytes(damaged)

    rig.pull(REF)

    assert_stored(rig)


def test_a_model_that_was_not_one_leaves_the_tag_as_it_was(rig: Rig) -> None:
    before = rig.pull(REF)
    broken = MODEL[:64] + b"\xff" * 64 + MODEL[128:]
    rig.hub.repos[REPO].commit([HubFile.of(FILE, broken)])
    with pytest.raises(GgufInvalid):
        rig.pull(REF)
    after = rig.store.get_tag(NAME)
    assert after is not None
    assert after.manifest == before.manifest
    assert_stored(rig)


def test_something_else_than_gguf_is_noticed_at_its_first_bytes(rig: Rig) -> None:
    page = b"<!DOCTYPE html>" + bytes(2 << 20)
    rig.hub.repos[REPO].commit([HubFile.of(FILE, page)])
    with pytest.raises(GgufInvalid, match="DOCTYPE"):
        rig.pull(REF)
    assert_nothing_stored(rig)


# Cancel


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


@pytest.mark.parametrize("phase", ["api", "resolve", "data", "body", "retry", "texts"])
def test_cancel_ends_every_phase_at_once(hub: HubServer, tmp_path: Path, phase: str) -> None:
    patient = replace(QUICK, stall_timeout_s=600.0, retry=replace(QUICK.retry, base_s=600.0, cap_s=600.0))
    rig = Rig(hub, tmp_path / "store", patient)
    faults: dict[str, Fault] = {
        "api": Silence("api"),
        "resolve": Silence("resolve"),
        "data": Silence("data"),
        "body": Stall(10_000),
        "retry": Cut(0),
        "texts": Silence("resolve"),
    }
    hub.fault(REPO, "LICENSE" if phase == "texts" else None, faults[phase])
    cancelled = threading.Event()
    outcome: list[object] = []

    def pull() -> None:
        try:
            outcome.append(rig.pull(REF, cancelled=cancelled))
        except LmdError as error:
            outcome.append(error)

    thread = threading.Thread(target=pull)
    try:
        thread.start()
        reached = {
            "api": lambda: len(hub.requests) == 1,
            "resolve": lambda: any("/resolve/" in r.path for r in hub.requests),
            "data": lambda: any(r.role == "cdn" for r in hub.requests),
            "body": lambda: any(e.completed_bytes for e in rig.events),
            "retry": lambda: PullState.RETRYING in rig.states(),
            "texts": lambda: any("LICENSE" in r.path for r in hub.requests),
        }
        wait_for(reached[phase], phase)
        cancelled.set()
        # The waits above are ten minutes long: ending soon means that none of them was waited for.
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        assert isinstance(outcome[0], PullCancelled)
        assert rig.store.list_tags() == []
    finally:
        cancelled.set()
        rig.close()
        thread.join(DEADLINE_S)


def test_cancel_before_the_start_asks_nothing(rig: Rig) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(PullCancelled):
        rig.pull(REF, cancelled=cancelled)
    assert rig.hub.requests == []


# Many at once


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    results: list[object] = [None] * count

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except LmdError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    return results


def test_twenty_pulls_of_one_blob_make_one_transfer(hub: HubServer, tmp_path: Path) -> None:
    rig = Rig(hub, tmp_path / "store", ONE_CONNECTION)
    downloading = threading.Semaphore(0)
    everybody = threading.Event()
    hub.fault(REPO, FILE, Trigger(1, lambda: everybody.wait(DEADLINE_S)))

    def pull(_: int) -> TagRecord:
        first = True

        def note(event: PullEvent) -> None:
            nonlocal first
            if event.state is PullState.DOWNLOADING and first:
                first = False
                downloading.release()

        return rig.pull(REF, on_event=note)

    def let_go() -> None:
        # The transfer stands still until all of them have joined it.
        for _ in range(20):
            assert downloading.acquire(timeout=DEADLINE_S)
        everybody.set()

    opener = threading.Thread(target=let_go)
    opener.start()
    try:
        results = in_threads(20, pull)
        opener.join(DEADLINE_S)
        assert {getattr(result, "manifest", result) for result in results} == {rig.pull(REF).manifest}
        assert [(r.status, r.sent_bytes) for r in hub.data_requests(FILE)] == [(206, len(MODEL))]
    finally:
        rig.close()


def test_who_leaves_does_not_disturb_the_others_and_the_last_one_stops_it(rig: Rig) -> None:
    release = threading.Event()
    rig.hub.fault(REPO, FILE, Trigger(500_000, release.wait))
    cancels = [threading.Event() for _ in range(5)]
    outcomes: dict[int, object] = {}
    downloading = threading.Semaphore(0)

    def pull(index: int) -> None:
        seen = False

        def note(event: PullEvent) -> None:
            nonlocal seen
            if event.state is PullState.DOWNLOADING and not seen:
                seen = True
                downloading.release()

        try:
            outcomes[index] = rig.pull(REF, cancelled=cancels[index], on_event=note)
        except LmdError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=pull, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert downloading.acquire(timeout=DEADLINE_S)
    cancels[0].set()
    threads[0].join(DEADLINE_S)
    assert isinstance(outcomes[0], PullCancelled)
    release.set()
    for thread in threads[1:]:
        thread.join(DEADLINE_S)
    assert all(not isinstance(outcomes[index], LmdError) for index in range(1, 5))
    assert_stored(rig)


def test_a_flight_that_fails_on_its_owners_token_does_not_fail_who_joined_with_a_better_one(rig: Rig) -> None:
    """The first caller's token is refused while a second caller, whose token is good, waits for the same blob."""
    repo = rig.hub.repos[REPO]
    repo.gated = True
    repo.allowed.add("hf_good")
    first_asks, second_waits = threading.Event(), threading.Event()

    def hold(record: RequestRecord) -> None:
        if "/resolve/" in record.path and not first_asks.is_set():
            first_asks.set()
            second_waits.wait(DEADLINE_S)

    def pull(index: int) -> TagRecord:
        if index == 0:
            return rig.pull(REF, token="hf_other")
        assert first_asks.wait(DEADLINE_S)
        joined = lambda event: second_waits.set() if event.state is PullState.DOWNLOADING else None  # noqa: E731
        return rig.pull(REF, token="hf_good", on_event=joined)

    rig.hub.on_request = hold
    outcomes = in_threads(2, pull)
    assert isinstance(outcomes[0], SourceDenied)
    assert not isinstance(outcomes[1], LmdError)
    assert_stored(rig)


# URLs


def test_a_url_is_pulled_resumed_and_remembered_by_its_etag(rig: Rig) -> None:
    url = rig.hub.add_plain("x.gguf", MODEL, etag='"v1"')
    rig.hub.fault("plain", "x.gguf", Cut(200_000), times=4)
    tag = rig.pull(f"{url}?sig=secret")
    assert tag.name == url
    assert_stored(rig, url)
    rig.hub.requests.clear()
    rig.pull(f"{url}?sig=secret")
    assert rig.hub.data_requests("x.gguf") == []

    changed = make_gguf(1 << 20, seed=8)
    rig.hub.add_plain("x.gguf", changed, etag='"v2"')
    rig.pull(f"{url}?sig=secret")
    assert_stored(rig, url, changed)


def test_no_secret_of_a_url_reaches_the_store(rig: Rig) -> None:
    url = rig.hub.add_plain("x.gguf", MODEL, etag='"v1"').replace("://", "://me:pass%20word@")
    rig.pull(f"{url}?sig=top-secret")
    for path in rig.store.root.rglob("*"):
        if path.is_file() and path.stat().st_size < 1 << 20:
            data = path.read_bytes()
            assert b"top-secret" not in data
            assert b"pass" not in data
    sent = [r.headers.get("authorization", "") for r in rig.hub.requests]
    assert all(value.startswith("Basic ") for value in sent)


def test_a_url_that_changes_in_the_middle_is_not_mixed(rig: Rig) -> None:
    url = rig.hub.add_plain("x.gguf", MODEL, etag='"v1"')
    other = make_gguf(3 << 20, seed=12)

    def change() -> None:
        rig.hub.add_plain("x.gguf", other, etag='"v2"')

    rig.hub.fault("plain", "x.gguf", Trigger(600_000, change))
    with pytest.raises(SourceInvalid, match="changed"):
        rig.pull(url)
    rig.hub.faults.clear()
    rig.pull(url)
    assert_stored(rig, url, other)


def test_a_url_without_a_validator_is_never_resumed(rig: Rig) -> None:
    url = rig.hub.add_plain("x.gguf", MODEL)
    rig.hub.fault("plain", "x.gguf", Stall(100_000))
    cancelled = threading.Event()
    with pytest.raises(PullCancelled):
        rig.pull(url, cancelled=cancelled, on_event=lambda e: cancelled.set() if e.completed_bytes else None)
    rig.hub.faults.clear()
    rig.events.clear()
    other = make_gguf(3 << 20, seed=13)
    rig.hub.add_plain("x.gguf", other)
    rig.pull(url)
    assert max(event.resumed_bytes for event in rig.events) == 0
    assert_stored(rig, url, other)


@pytest.mark.parametrize("status", [403, 405, 501])
def test_a_server_that_does_not_answer_head(rig: Rig, status: int) -> None:
    url = rig.hub.add_plain("x.gguf", MODEL, etag='"v1"')
    rig.hub.fault("plain", "x.gguf", Answer("data", status), times=1)
    rig.pull(url)
    assert_stored(rig, url)


def test_a_url_that_is_not_there_or_no_model(rig: Rig) -> None:
    with pytest.raises(SourceNotFound):
        rig.pull(f"{rig.hub.endpoint}/plain/missing.gguf")
    url = rig.hub.add_plain("page.gguf", b"<html>" + bytes(1000))
    with pytest.raises(GgufInvalid):
        rig.pull(url)
    url = rig.hub.add_plain("empty.gguf", b"")
    with pytest.raises(GgufInvalid):
        rig.pull(url)
    assert rig.store.list_tags() == []


def test_an_asserted_digest_is_required(rig: Rig) -> None:
    url = rig.hub.add_plain("x.gguf", MODEL)
    rig.pull(f"{url}@{sha256_of(MODEL)}")
    assert_stored(rig, url)
    wrong = "sha256:" + "0" * 64
    with pytest.raises(DigestMismatch):
        rig.pull(f"{url}@{wrong}")
    rig.hub.requests.clear()
    with pytest.raises(DigestMismatch):
        rig.pull(f"{REF}@{wrong}")
    assert rig.hub.data_requests(FILE) == []


# Files


def test_a_local_file_and_its_shards(rig: Rig, tmp_path: Path) -> None:
    single = tmp_path / "Small Model.gguf"
    single.write_bytes(MODEL)
    tag = rig.pull(f"file:{single}")
    assert tag.name == "small-model:latest"
    assert_stored(rig, tag.name)
    assert rig.events[-1].state is PullState.DONE

    for n in range(1, 4):
        (tmp_path / f"big-{n:05}-of-00003.gguf").write_bytes(make_gguf(64, seed=n, shard=(n - 1, 3)))
    tag = rig.pull(str(tmp_path / "big-00002-of-00003.gguf"))
    assert len(rig.store.get_manifest(tag.manifest).weights) == 3
    (tmp_path / "big-00003-of-00003.gguf").unlink()
    with pytest.raises(LmdError, match=r"big-00003-of-00003\.gguf is missing"):
        rig.pull(str(tmp_path / "big-00001-of-00003.gguf"))
