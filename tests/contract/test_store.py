"""The store's promises, through its facade."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lmd.registry.digest import Digest
from lmd.registry.errors import (
    BlobCorrupt,
    BlobMissing,
    DigestMismatch,
    DiskFull,
    FileChanged,
    FileInvalid,
    InvalidRequest,
    PullCancelled,
    StoreError,
    StoreLocked,
)
from lmd.registry.store import Ingest, Store
from tests.support.stored_models import (
    FakeClock,
    assert_store_is_right,
    blob_file,
    descriptor,
    make_model,
    put_model,
)

DAY_S = 86400.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(time.time())


@pytest.fixture
def store(root: Path, clock: FakeClock) -> Iterator[Store]:
    with Store.open(root, clock=clock) as opened:
        yield opened


def plant(path: Path, data: bytes) -> Path:
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def quarantined(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "quarantine").iterdir())


# Opening


def test_a_new_store_is_private_and_a_valid_oci_layout(root: Path, store: Store) -> None:
    assert {stat.S_IMODE(path.stat().st_mode) for path in (root, root / "blobs" / "sha256", root / "ingest")} == {0o700}
    assert_store_is_right(root, store)
    assert store.root == root


def test_a_second_owner_is_refused_and_told_who_has_it(root: Path, store: Store) -> None:
    with pytest.raises(StoreLocked, match=f"process {os.getpid()} owns") as caught:
        Store.open(root)
    assert caught.value.metadata["pid"] == str(os.getpid())
    store.close()
    Store.open(root).close()


def test_the_lock_of_a_dead_process_does_not_block(root: Path) -> None:
    script = "import sys,time; from pathlib import Path; from lmd.registry.store import Store\n"
    script += "store = Store.open(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdin is not None
    try:
        assert owner.stdout.readline() == "open\n"
        with pytest.raises(StoreLocked, match=f"process {owner.pid} owns"):
            Store.open(root)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdin.close()
        owner.stdout.close()
    Store.open(root).close()


def test_closing_twice_is_harmless_and_a_closed_store_says_so(root: Path, store: Store) -> None:
    store.close()
    with Store.open(root):
        store.close()
        with pytest.raises(StoreLocked):
            Store.open(root)
    with pytest.raises(StoreError, match="closed"):
        store.list_tags()


def test_opening_reads_no_blob(root: Path, store: Store) -> None:
    """Two thousand sparse files of 1 GiB each would take half an hour to hash."""
    store.close()
    for number in range(2000):
        with blob_file(root, Digest.of(str(number).encode())).open("wb") as file:
            file.truncate(1 << 30)
    with Store.open(root) as again:
        assert again.usage().blobs == 2000
        assert quarantined(root) == []


def test_temporary_files_of_a_dead_process_go_and_its_ingests_stay(root: Path, store: Store) -> None:
    with store.begin_ingest("kept", total_bytes=None) as ingest:
        ingest.write(0, b"abc")
        ingest.note(0, 3)
        part = ingest.path
    store.close()
    plant(root / "ingest" / "tmp-0123", b"half")
    plant(root / "ingest" / f"{'a' * 64}.journal", b"of a part that was committed")
    with Store.open(root):
        assert sorted(path.name for path in (root / "ingest").iterdir()) == [
            part.with_suffix(".journal").name,
            part.name,
        ]


# Blobs


def test_bytes_come_back_under_their_digest(root: Path, store: Store) -> None:
    digest = store.put_bytes(b"hello")
    assert digest == Digest.of(b"hello")
    assert store.put_bytes(memoryview(b"hello")) == digest
    assert store.blob_path(digest) == blob_file(root, digest)
    assert stat.S_IMODE(store.blob_path(digest).stat().st_mode) == 0o444
    assert store.blob_size(digest) == 5
    with store.open_blob(digest) as file:
        assert file.read() == b"hello"
    assert store.has_blob(digest, 5)
    assert store.has_blob(digest, None)


def test_an_absent_blob(store: Store) -> None:
    digest = Digest.of(b"never")
    assert not store.has_blob(digest, None)
    operations: list[Callable[[Digest], object]] = [
        store.blob_path,
        store.blob_size,
        store.open_blob,
        store.verify_blob,
        store.get_manifest,
    ]
    for operation in operations:
        with pytest.raises(BlobMissing):
            operation(digest)


def test_a_wrong_size_does_not_condemn_a_good_blob(root: Path, store: Store) -> None:
    """A source that lies about a size must not be able to throw other models' blobs out."""
    digest = store.put_bytes(b"good")
    assert not store.has_blob(digest, 999)
    assert store.has_blob(digest, 4)
    assert quarantined(root) == []


@pytest.mark.parametrize("planted", [b"", b"hel", b"jello", b"hello!"], ids=["empty", "short", "flipped", "long"])
def test_a_planted_bad_file_goes_to_quarantine(root: Path, store: Store, planted: bytes) -> None:
    digest = Digest.of(b"hello")
    plant(blob_file(root, digest), planted)
    assert not store.has_blob(digest, 5)
    assert quarantined(root) == [f"{digest.hex}.0"]
    plant(blob_file(root, digest), planted)
    with pytest.raises(BlobCorrupt):
        store.open_blob(digest)
    assert quarantined(root) == [f"{digest.hex}.0", f"{digest.hex}.1"]
    store.put_bytes(b"hello")
    assert store.has_blob(digest, 5)


def test_a_planted_good_file_is_hashed_and_taken(root: Path, store: Store) -> None:
    digest = Digest.of(b"hello")
    plant(blob_file(root, digest), b"hello")
    assert store.has_blob(digest, 5)
    assert store.blob_path(digest).read_bytes() == b"hello"


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "socket"])
def test_what_is_no_file_is_never_served(root: Path, store: Store, tmp_path: Path, kind: str) -> None:
    digest = Digest.of(b"hello")
    path = blob_file(root, digest)
    if kind == "symlink":
        path.symlink_to(plant(tmp_path / "hello", b"hello"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            short = root / "s"
            listener.bind(str(short))
            short.rename(path)
    assert not store.has_blob(digest, None)
    assert quarantined(root) == [f"{digest.hex}.0"]
    assert store.put_bytes(b"hello") == digest


def test_a_directory_under_a_blobs_name_makes_way_for_it(root: Path, store: Store) -> None:
    blob_file(root, Digest.of(b"hello")).mkdir()
    store.put_bytes(b"hello")
    assert_store_is_right(root, store)


def test_a_change_in_place_is_noticed(root: Path, store: Store) -> None:
    digest = store.put_bytes(b"hello")
    os.utime(blob_file(root, digest))
    assert store.has_blob(digest, 5), "touched, but still right"
    with blob_file(root, digest).open("r+b") as file:
        file.write(b"J")
    os.utime(blob_file(root, digest))
    with pytest.raises(BlobCorrupt):
        store.blob_path(digest)
    assert not store.has_blob(digest, 5)


def test_verify_sees_what_the_mark_cannot(root: Path, store: Store) -> None:
    digest = store.put_bytes(b"hello")
    path = blob_file(root, digest)
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"J")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.has_blob(digest, 5)
    with pytest.raises(BlobCorrupt):
        store.verify_blob(digest)
    assert not store.has_blob(digest, 5)
    assert quarantined(root) == [f"{digest.hex}.0"]


def test_many_threads_put_and_ask_for_the_same_blobs(root: Path, store: Store) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for number in range(10):
                digest = store.put_bytes(str(number).encode())
                assert store.has_blob(digest, None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.usage().blobs == 10
    assert_store_is_right(root, store)


# Ingests


def test_an_ingest_becomes_a_blob(root: Path, store: Store) -> None:
    data = bytes(range(256)) * 100
    digest = Digest.of(data)
    ingest = store.begin_ingest(str(digest), total_bytes=len(data))
    assert ingest.received() == []
    ingest.write(1000, data[1000:])
    ingest.note(1000, len(data) - 1000)
    assert ingest.received() == [(1000, len(data))]
    assert not store.has_blob(digest, None)
    ingest.write(0, memoryview(data)[:1000])
    ingest.note(0, 1000)
    assert ingest.received() == [(0, len(data))]
    assert ingest.received_bytes == len(data)
    ingest.checkpoint()
    assert ingest.commit(digest, len(data)) == digest
    assert store.blob_path(digest).read_bytes() == data
    assert stat.S_IMODE(store.blob_path(digest).stat().st_mode) == 0o444
    assert list((root / "ingest").iterdir()) == []
    assert store.usage().ingests == 0


def test_an_ingest_is_resumed_after_a_close_and_after_another_open(root: Path, store: Store) -> None:
    ingest = store.begin_ingest("https://host/x.gguf", total_bytes=10)
    ingest.write(0, b"01234")
    ingest.note(0, 5)
    ingest.close()
    ingest.close()
    with store.begin_ingest("https://host/x.gguf", total_bytes=None) as again:
        assert again.received() == [(0, 5)]
        assert again.total_bytes == 10
        assert os.pread(again.fd, 10, 0) == b"01234"
    store.close()
    with Store.open(root) as later, later.begin_ingest("https://host/x.gguf", total_bytes=10) as again:
        assert again.received() == [(0, 5)]


def test_after_a_boot_only_what_was_checkpointed_counts(root: Path) -> None:
    with Store.open(root, boot_id="one") as store, store.begin_ingest("k", total_bytes=30) as ingest:
        ingest.write(0, bytes(10))
        ingest.note(0, 10)
        ingest.checkpoint()
        ingest.write(20, bytes(10))
        ingest.note(20, 10)
    with Store.open(root, boot_id="one") as store, store.begin_ingest("k", total_bytes=30) as ingest:
        assert ingest.received() == [(0, 10), (20, 30)]
    with Store.open(root, boot_id="two") as store, store.begin_ingest("k", total_bytes=30) as ingest:
        assert ingest.received() == [(0, 10)]
        assert ingest.path.stat().st_size == 10
        ingest.write(10, bytes(20))
        ingest.note(10, 20)
        ingest.checkpoint()
    with Store.open(root, boot_id="three") as store, store.begin_ingest("k", total_bytes=30) as ingest:
        assert ingest.received() == [(0, 30)]


def test_an_ingest_has_one_writer(store: Store) -> None:
    first = store.begin_ingest("k", total_bytes=None)
    with pytest.raises(StoreError, match="another writer"):
        store.begin_ingest("k", total_bytes=None)
    first.close()
    store.begin_ingest("k", total_bytes=None).close()


def test_another_size_starts_over(store: Store) -> None:
    with store.begin_ingest("k", total_bytes=10) as ingest:
        ingest.write(0, b"01234")
        ingest.note(0, 5)
    with store.begin_ingest("k", total_bytes=11) as ingest:
        assert ingest.received() == []
        assert ingest.path.stat().st_size == 0


def test_reset_and_discard(root: Path, store: Store) -> None:
    ingest = store.begin_ingest("k", total_bytes=10)
    ingest.write(0, b"01234")
    ingest.note(0, 5)
    ingest.reset()
    assert ingest.received() == []
    ingest.write(0, b"abc")
    ingest.note(0, 3)
    ingest.commit(Digest.of(b"abc"), 3)
    ingest = store.begin_ingest("k", total_bytes=10)
    ingest.write(0, b"01234")
    ingest.discard()
    ingest.discard()
    assert list((root / "ingest").iterdir()) == []
    with pytest.raises(StoreError, match="closed"):
        ingest.write(0, b"x")


def test_a_part_of_the_wrong_size_is_no_blob_and_can_go_on(store: Store) -> None:
    with store.begin_ingest("k", total_bytes=None) as ingest:
        ingest.write(0, b"abc")
        ingest.note(0, 3)
        with pytest.raises(StoreError, match="3 bytes, not 6"):
            ingest.commit(Digest.of(b"abcdef"), 6)
        assert not store.has_blob(Digest.of(b"abcdef"), None)
        ingest.write(3, b"def")
        ingest.note(3, 3)
        ingest.commit(Digest.of(b"abcdef"), 6)
    assert store.has_blob(Digest.of(b"abcdef"), 6)


def test_committing_what_is_there_already(root: Path, store: Store) -> None:
    digest = store.put_bytes(b"abc")
    inode = store.blob_path(digest).stat().st_ino
    with store.begin_ingest("k", total_bytes=3) as ingest:
        ingest.write(0, b"abc")
        ingest.commit(digest, 3)
    assert store.blob_path(digest).stat().st_ino == inode
    assert list((root / "ingest").iterdir()) == []


def test_committing_over_a_bad_file(root: Path, store: Store) -> None:
    digest = Digest.of(b"abc")
    plant(blob_file(root, digest), b"bad")
    with store.begin_ingest("k", total_bytes=3) as ingest:
        ingest.write(0, b"abc")
        ingest.commit(digest, 3)
    assert_store_is_right(root, store)


def test_bytes_behind_the_last_trusted_one_do_not_make_the_blob_longer(store: Store) -> None:
    with store.begin_ingest("k", total_bytes=None) as ingest:
        ingest.write(0, b"abc")
        ingest.note(0, 3)
        ingest.write(3, b"written, but its note never came")
    with store.begin_ingest("k", total_bytes=None) as ingest:
        ingest.commit(Digest.of(b"abc"), 3)


def test_a_part_that_was_about_to_be_renamed_is_resumed(store: Store) -> None:
    """A process that dies between making the part read-only and renaming it must not lock itself out."""
    with store.begin_ingest("k", total_bytes=3) as ingest:
        ingest.write(0, b"abc")
        ingest.note(0, 3)
    ingest.path.chmod(0o444)
    with store.begin_ingest("k", total_bytes=3) as ingest:
        assert ingest.received() == [(0, 3)]
        assert stat.S_IMODE(ingest.path.stat().st_mode) == 0o600


def test_a_ruined_journal_means_starting_over(store: Store) -> None:
    with store.begin_ingest("k", total_bytes=3) as ingest:
        ingest.write(0, b"abc")
        ingest.note(0, 3)
    ingest.path.with_suffix(".journal").write_bytes(b"\0" * 100)
    with store.begin_ingest("k", total_bytes=3) as ingest:
        assert ingest.received() == []


def test_a_part_that_lost_its_tail_is_trusted_as_far_as_it_goes(store: Store) -> None:
    with store.begin_ingest("k", total_bytes=20) as ingest:
        ingest.write(0, bytes(20))
        ingest.note(0, 20)
    os.truncate(ingest.path, 12)
    with store.begin_ingest("k", total_bytes=20) as ingest:
        assert ingest.received() == [(0, 12)]


def test_threads_fill_one_ingest(store: Store) -> None:
    data = os.urandom(1 << 20)
    step = 1 << 13
    with store.begin_ingest("k", total_bytes=len(data)) as ingest:

        def work(first: int) -> None:
            for offset in range(first * step, len(data), 4 * step):
                ingest.write(offset, data[offset : offset + step])
                ingest.note(offset, step)
                if offset % (16 * step) == 0:
                    ingest.checkpoint()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ingest.received() == [(0, len(data))]
        ingest.close()
    with store.begin_ingest("k", total_bytes=len(data)) as again:
        assert again.received() == [(0, len(data))]
        again.commit(Digest.of(data), len(data))


def test_a_long_journal_is_rewritten_and_says_the_same(store: Store) -> None:
    size_bytes = 20_000
    with store.begin_ingest("k", total_bytes=size_bytes) as ingest:
        ingest.write(0, bytes(size_bytes))
        for offset in range(size_bytes):
            ingest.note(offset, 1)
        ingest.checkpoint()
        assert ingest.path.with_suffix(".journal").stat().st_size < 1000
        ingest.write(size_bytes, b"x")
        ingest.note(size_bytes, 1)
    with store.begin_ingest("k", total_bytes=size_bytes) as ingest:
        assert ingest.received() == [(0, size_bytes + 1)]


# Manifests


def test_a_manifest_needs_its_blobs(store: Store) -> None:
    model = make_model(b"weights")
    for blob in model.blobs:
        with pytest.raises(BlobMissing):
            store.put_manifest(model.manifest)
        store.put_bytes(blob)
    assert store.put_manifest(model.manifest) == model.digest
    assert store.put_manifest(model.manifest) == model.digest
    assert store.blob_path(model.digest).read_bytes() == model.manifest


def test_a_manifest_that_lies_about_a_size_is_refused(store: Store) -> None:
    model = make_model(b"weights")
    for blob in model.blobs:
        store.put_bytes(blob)
    with pytest.raises(BlobMissing):
        store.put_manifest(model.manifest.replace(b'"size": 7', b'"size": 8'))


GOOD = json.loads(make_model(b"w").manifest)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b" " * (4 << 20) + b"{}",
        json.dumps({**GOOD, "manifests": []}).encode(),
        json.dumps({**GOOD, "schemaVersion": 1}).encode(),
        json.dumps({**GOOD, "layers": None}).encode(),
        json.dumps({**GOOD, "layers": [descriptor("x", b"w")] * 1024}).encode(),
        json.dumps({**GOOD, "config": None}).encode(),
        json.dumps({**GOOD, "mediaType": 7}).encode(),
        json.dumps({**GOOD, "layers": [{"digest": str(Digest.of(b"w")), "size": -1}]}).encode(),
        json.dumps({**GOOD, "layers": [{"digest": str(Digest.of(b"w")), "size": True}]}).encode(),
        json.dumps({**GOOD, "layers": [{"digest": str(Digest.of(b"w")), "size": 1 << 60}]}).encode(),
        json.dumps({**GOOD, "layers": [{"digest": 7, "size": 1}]}).encode(),
        *(
            json.dumps({**GOOD, "layers": [{"digest": digest, "size": 1}]}).encode()
            for digest in ("sha256:../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "a" * 32, "a" * 64, "sha256:")
        ),
    ],
)
def test_a_hostile_manifest_is_refused(root: Path, store: Store, data: bytes) -> None:
    store.put_bytes(b"w")
    with pytest.raises(InvalidRequest):
        store.put_manifest(data)
    assert store.usage().blobs == 1


def test_get_manifest_hands_both_parts_to_the_parser(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class StandIn:
        @staticmethod
        def parse(data: bytes, lm_config: bytes) -> tuple[bytes, bytes]:
            return data, lm_config

    module = types.ModuleType("lmd.registry.manifest")
    module.Manifest = StandIn  # type: ignore[attr-defined]  # a stand-in for the real parser
    monkeypatch.setitem(sys.modules, "lmd.registry.manifest", module)
    model = make_model(b"weights", lm=b'{"system": "be brief"}')
    digest = put_model(store, model)
    parsed: object = store.get_manifest(digest)
    assert parsed == (model.manifest, b'{"system": "be brief"}')
    with pytest.raises(StoreError, match="no manifest"):
        store.get_manifest(Digest.of(b"weights"))


@pytest.mark.parametrize("victim", ["manifest", "lm_config"])
def test_get_manifest_hashes_what_it_reads(root: Path, store: Store, victim: str) -> None:
    model = make_model(b"weights", lm=b'{"system": "be brief"}')
    digest = put_model(store, model)
    path = blob_file(root, digest if victim == "manifest" else Digest.of(model.blobs[-1]))
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BlobCorrupt):
        store.get_manifest(digest)


# Tags


def test_a_tag_survives_and_is_found_in_any_case(root: Path, store: Store, clock: FakeClock) -> None:
    digest = put_model(store, make_model(b"a"))
    set_at = clock.now
    record = store.set_tag("hf.co/Org/Repo:Q4_K_M", digest, note="pulled")
    assert (record.name, record.manifest, record.modified_at) == ("hf.co/Org/Repo:Q4_K_M", digest, set_at)
    store.close()
    with Store.open(root) as again:
        assert again.get_tag("HF.co/org/repo:q4_k_m") == record
        assert again.get_tag("other") is None
        assert_store_is_right(root, again)


def test_tags_are_listed_newest_first_and_by_prefix(store: Store, clock: FakeClock) -> None:
    first, second = put_model(store, make_model(b"1")), put_model(store, make_model(b"2"))
    for name in ("b:latest", "a:latest", "A_b:latest"):
        clock.now += 1
        store.set_tag(name, first)
    assert [tag.name for tag in store.list_tags()] == ["A_b:latest", "a:latest", "b:latest"]
    assert [tag.name for tag in store.list_tags("A")] == ["A_b:latest", "a:latest"]
    assert [tag.name for tag in store.list_tags("a_")] == ["A_b:latest"]
    assert store.list_tags("%") == []
    clock.now += 1
    moved = store.set_tag("b:latest", second)
    assert store.list_tags()[0].name == "b:latest"
    clock.now += 1
    same = store.set_tag("b:latest", second)
    assert (same.modified_at, same.pulled_at) == (moved.modified_at, clock.now)


def test_a_tag_has_a_history(store: Store, clock: FakeClock) -> None:
    first, second = put_model(store, make_model(b"1")), put_model(store, make_model(b"2"))
    start = clock.now
    store.set_tag("a", first, note="pulled")
    store.set_tag("A", first, note="pulled again")
    clock.now += 1
    store.set_tag("a", second, note="updated")
    clock.now += 1
    store.delete_tag("a")
    history = [(change.manifest, change.changed_at - start, change.note) for change in store.tag_history("A")]
    assert history == [(first, 0, "pulled"), (second, 1, "updated"), (None, 2, "")]


@pytest.mark.parametrize("name", ["", "a\nb", "a\x00b", "é", "a\u202eb", "x" * 513])
def test_names_that_no_grammar_allows_are_refused(store: Store, name: str) -> None:
    digest = put_model(store, make_model(b"a"))
    with pytest.raises(InvalidRequest):
        store.set_tag(name, digest)
    assert store.list_tags() == []


def test_a_tag_needs_a_whole_model(root: Path, store: Store) -> None:
    with pytest.raises(BlobMissing):
        store.set_tag("a", Digest.of(b"nothing"))
    with pytest.raises(BlobMissing):
        store.set_tag("a", store.put_bytes(b"no manifest"))
    digest = put_model(store, make_model(b"a"))
    blob_file(root, Digest.of(b"a")).unlink()
    with pytest.raises(BlobMissing):
        store.set_tag("a", digest)
    assert store.list_tags() == []


def test_deleting_a_tag(root: Path, store: Store) -> None:
    digest = put_model(store, make_model(b"a"))
    record = store.set_tag("a", digest)
    assert store.delete_tag("A") == record
    assert store.delete_tag("a") is None
    store.close()
    with Store.open(root) as again:
        assert again.list_tags() == []
        assert_store_is_right(root, again)


def test_the_view_is_put_right_when_it_differs(root: Path, store: Store) -> None:
    store.set_tag("a", put_model(store, make_model(b"a")))
    store.close()
    (root / "index.json").write_bytes(b"{}")
    (root / "oci-layout").unlink()
    with Store.open(root) as again:
        assert_store_is_right(root, again)


# A damaged index


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_one_page(path: Path) -> None:
    os.truncate(path, 4096)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def fill_with_garbage(path: Path) -> None:
    path.write_bytes(b"\xa5" * path.stat().st_size)


def ruin_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [cut_in_half, cut_to_one_page, empty, fill_with_garbage, ruin_the_middle, Path.unlink]
)
def test_a_damaged_index_is_rebuilt(
    root: Path, store: Store, clock: FakeClock, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    model, other = make_model(b"a"), make_model(b"b")
    store.set_tag("Kept:latest", put_model(store, model))
    store.set_tag("gone:latest", put_model(store, other))
    store.delete_tag("gone:latest")
    tags = store.list_tags()
    store.close()
    damage(root / "index.db")
    with Store.open(root, clock=clock) as again:
        assert again.list_tags() == tags
        assert "rebuilt the index" in caplog.text
        clock.now += DAY_S
        assert {item.digest_or_name for item in again.collect()} == {str(other.digest), str(Digest.of(b"b"))}
        assert_store_is_right(root, again)
        assert again.has_blob(Digest.of(b"a"), 1)
    with Store.open(root) as once_more:
        assert once_more.list_tags() == tags


def test_a_rebuilt_index_has_no_names_of_broken_models(root: Path, store: Store) -> None:
    store.set_tag("whole", put_model(store, make_model(b"a")))
    store.set_tag("broken", put_model(store, make_model(b"b")))
    store.close()
    (root / "index.db").unlink()
    blob_file(root, Digest.of(b"b")).unlink()
    with Store.open(root) as again:
        assert [tag.name for tag in again.list_tags()] == ["whole"]


def test_without_index_and_view_nothing_is_lost_at_once(root: Path, store: Store, clock: FakeClock) -> None:
    model = make_model(b"a")
    store.set_tag("a", put_model(store, model))
    store.close()
    (root / "index.db").write_bytes(b"garbage" * 1000)
    (root / "index.json").write_bytes(b"garbage")
    with Store.open(root, clock=clock) as again:
        clock.now += DAY_S
        assert list(again.collect()) == []
        again.set_tag("found", model.digest)


def test_an_index_of_a_newer_release_is_refused_and_left_alone(root: Path, store: Store) -> None:
    store.set_tag("a", put_model(store, make_model(b"a")))
    with store._index.write("test") as db:
        db.execute("INSERT INTO migrations VALUES (99, 'm099_from_the_future', 0)")
    store.close()
    with pytest.raises(StoreError, match="m099_from_the_future"):
        Store.open(root)
    assert not list(root.glob("index.db.damaged*"))


# Leases and garbage


def garbage(store: Store, **options: float) -> list[tuple[str, str]]:
    return [(item.kind, item.digest_or_name) for item in store.collect(**options)]  # type: ignore[arg-type]


def test_what_nobody_names_goes_after_the_grace_period(root: Path, store: Store, clock: FakeClock) -> None:
    kept, lost = make_model(b"kept"), make_model(b"lost", lm=b"{}x")
    store.set_tag("kept", put_model(store, kept))
    put_model(store, lost)
    orphans = {str(digest) for digest in (lost.digest, Digest.of(b"lost"), Digest.of(b"{}x"))}
    collection = store.collect()
    assert list(collection) == []
    assert collection.spared_items == 3
    clock.now += 3601
    listed = list(store.collect(dry_run=True))
    assert {item.digest_or_name for item in listed} == orphans
    assert store.has_blob(lost.digest, None), "a dry run removes nothing"
    assert list(store.collect()) == listed
    assert listed[0].digest_or_name == str(lost.digest), "a manifest goes before its blobs"
    assert not store.has_blob(Digest.of(b"lost"), None)
    assert list(store.collect(grace_s=0)) == []
    assert_store_is_right(root, store)


def test_the_grace_period_starts_when_a_blob_is_put_not_when_its_bytes_were_written(
    store: Store, clock: FakeClock, tmp_path: Path
) -> None:
    """A hard-linked or long resumed file has an old modification time; its manifest may still be on its way."""
    source = plant(tmp_path / "old.gguf", b"old")
    os.utime(source, (1e9, 1e9))
    source.chmod(0o444)
    digest, _ = store.import_file(source)
    assert list(store.collect()) == []
    clock.now += 3601
    store.put_bytes(b"old")
    assert list(store.collect()) == [], "put again, it is young again"
    clock.now += 3601
    assert garbage(store) == [("blob", str(digest))]


def test_a_clock_that_jumps_back_collects_nothing_young(store: Store, clock: FakeClock) -> None:
    store.put_bytes(b"young")
    clock.now -= 10 * DAY_S
    assert list(store.collect()) == []


def test_a_lease_protects_blobs_and_manifests_with_all_they_need(store: Store, clock: FakeClock) -> None:
    model = make_model(b"a")
    with store.lease("pull") as lease:
        lease.add(*model.blob_digests)
        for blob in model.blobs:
            store.put_bytes(blob)
        assert garbage(store, grace_s=0) == []
        store.put_manifest(model.manifest)
        with store.lease("create") as other:
            other.add(model.digest)
            lease.release()
            assert garbage(store, grace_s=0) == []
            clock.now += 10 * DAY_S
            assert garbage(store, grace_s=0) == [], "a lease that somebody holds does not expire"
    assert len(garbage(store, grace_s=0)) == 4


def test_the_lease_of_a_dead_process_expires(root: Path, store: Store, clock: FakeClock) -> None:
    digest = store.put_bytes(b"a")
    lease = store.lease("pull", ttl_s=DAY_S)
    lease.add(digest)
    store.close()
    del lease
    with Store.open(root, clock=clock) as again:
        assert garbage(again, grace_s=0) == []
        clock.now += DAY_S + 1
        assert garbage(again, grace_s=0) == [("blob", str(digest))]


def test_a_lease_left_by_a_dead_process_ends_with_the_next_one_of_its_owner(root: Path, store: Store) -> None:
    """A daemon is killed in a pull, and the pull is repeated; then the model is removed.

    The lease of the dead daemon once stayed for its whole day. Neither `lm rm` nor `lm gc` gave the space back, and
    `lm rm` promised it for when the model stops, which did not even run.
    """
    model = make_model(b"a")
    for owner in ("pull a", "pull b"):
        left_behind = store.lease(owner)
        left_behind.add(*model.blob_digests)
        del left_behind
    store.close()
    with Store.open(root) as again:
        with again.lease("pull a"), again.lease("pull a") as lease:
            lease.add(*model.blob_digests)
            again.set_tag("a", put_model(again, model))
        again.delete_tag("a")
        again.sweep_condemned()
        assert again.usage().blobs == 3, "the resumed pull of b still finds what it had"
        again.lease("pull b").release()
        again.sweep_condemned()
        assert again.usage().blobs == 0


def test_a_lease_protects_the_ingest_of_its_digest(root: Path, store: Store) -> None:
    digest = Digest.of(b"later")
    lease = store.lease("pull")
    lease.add(digest)
    with store.begin_ingest(str(digest), total_bytes=None) as ingest:
        ingest.write(0, b"la")
        ingest.note(0, 2)
    assert garbage(store, grace_s=0) == []
    lease.release()
    assert garbage(store, grace_s=0) == [("ingest", str(digest))]
    assert list((root / "ingest").iterdir()) == []


def test_resident_models_stay(store: Store) -> None:
    model = make_model(b"a")
    put_model(store, model)
    resident = {model.digest}
    store.set_resident_roots(lambda: resident)
    assert garbage(store, grace_s=0) == []
    resident.clear()
    assert len(garbage(store, grace_s=0)) == 4


def test_a_running_ingest_stays_and_an_abandoned_one_goes(store: Store, clock: FakeClock) -> None:
    with store.begin_ingest("running", total_bytes=None) as ingest:
        ingest.write(0, b"x")
        clock.now += DAY_S
        assert garbage(store) == []
    assert garbage(store) == [("ingest", "running")]
    assert store.usage().ingests == 0


def test_quarantine_is_emptied_after_the_grace_period(root: Path, store: Store, clock: FakeClock) -> None:
    digest = Digest.of(b"hello")
    plant(blob_file(root, digest), b"bad")
    assert not store.has_blob(digest, None)
    usage = store.usage()
    assert (usage.quarantined, usage.quarantined_bytes) == (1, 3)
    assert garbage(store) == []
    clock.now += 3700
    assert garbage(store) == [("quarantined", f"{digest.hex}.0")]
    assert quarantined(root) == []


def test_only_names_that_are_digests_are_ever_removed(root: Path, store: Store) -> None:
    names = ["README", "a" * 63, "A" * 64, "a" * 65, ".hidden", f"{'a' * 64}.part"]
    for name in names:
        (root / "blobs" / "sha256" / name).write_bytes(b"mine")
    (root / "ingest" / "notes.txt").write_bytes(b"mine")
    assert garbage(store, grace_s=0) == []
    assert sorted(os.listdir(root / "blobs" / "sha256")) == sorted(names)
    assert (root / "ingest" / "notes.txt").exists()


@pytest.mark.parametrize("saved_by", ["tag", "lease", "resident"])
def test_what_becomes_needed_during_a_collection_stays(root: Path, store: Store, saved_by: str) -> None:
    """The first item comes from one batch; what is marked garbage for the next one must be looked at again."""
    model = make_model(b"needed")
    digest = put_model(store, model)
    for number in range(200):
        store.put_bytes(str(number).encode())
    collection = iter(store.collect(grace_s=0))
    needed = {str(each) for each in (digest, *model.blob_digests)}
    # The manifest would go first of all, so the collection must be stopped before it has begun.
    if saved_by == "tag":
        store.set_tag("a", digest)
    elif saved_by == "lease":
        lease = store.lease("pull")
        lease.add(digest)
    else:
        store.set_resident_roots(lambda: [digest])
    removed = {item.digest_or_name for item in collection}
    assert len(removed) == 200
    assert not removed & needed
    assert all(store.has_blob(each, None) for each in model.blob_digests)


def test_a_collection_may_change_threads_and_be_abandoned(store: Store) -> None:
    for number in range(150):
        store.put_bytes(str(number).encode())
    collection = store.collect(grace_s=0)
    items = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: items.append(next(collection)))
        thread.start()
        thread.join()
    assert len(items) == 3
    store.put_bytes(b"others go on")
    assert store.usage().blobs < 150


def test_collections_race_with_pulls_and_removals(root: Path, store: Store) -> None:
    """Pulls that hold a lease share blobs, come and go, while everything without a root is collected all the time."""
    failures: list[BaseException] = []
    pulling = threading.Event()
    pulling.set()

    def pull(number: int) -> None:
        model = make_model(b"shared by all", f"of {number}".encode())
        for _ in range(8):
            with store.lease(f"pull {number}") as lease:
                lease.add(*model.blob_digests, model.digest)
                for blob, digest in zip(model.blobs, model.blob_digests, strict=True):
                    if store.has_blob(digest, len(blob)):
                        continue
                    with store.begin_ingest(f"{number} {digest}", total_bytes=len(blob)) as ingest:
                        ingest.write(0, blob)
                        ingest.note(0, len(blob))
                        ingest.commit(digest, len(blob))
                store.set_tag(f"model-{number}", store.put_manifest(model.manifest))
            assert all(store.has_blob(digest, None) for digest in model.blob_digests)
            store.delete_tag(f"model-{number}")

    def collect() -> None:
        while pulling.is_set():
            list(store.collect(grace_s=0))
            store.sweep_condemned()

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    collector = threading.Thread(target=guarded, args=(collect,))
    pullers = [threading.Thread(target=guarded, args=(partial(pull, number),)) for number in range(3)]
    for thread in (collector, *pullers):
        thread.start()
    for thread in pullers:
        thread.join()
    pulling.clear()
    collector.join()
    assert failures == []
    list(store.collect(grace_s=0))
    assert store.usage().blobs == 0
    assert_store_is_right(root, store)


def test_removing_a_model_frees_what_only_it_needed(root: Path, store: Store) -> None:
    first, second = make_model(b"shared", b"one" * 100), make_model(b"shared", b"two")
    store.set_tag("first", put_model(store, first))
    store.set_tag("second", put_model(store, second))
    store.delete_tag("first")
    assert store.sweep_condemned() == 300 + len(first.manifest)
    assert store.sweep_condemned() == 0
    assert not store.has_blob(Digest.of(b"one" * 100), None)
    assert all(store.has_blob(each, None) for each in second.blob_digests)
    store.delete_tag("second")
    store.sweep_condemned()
    assert store.usage().blobs == 0


def test_a_copy_keeps_the_bytes(store: Store) -> None:
    digest = put_model(store, make_model(b"a"))
    store.set_tag("a", digest)
    store.set_tag("copy", digest)
    store.delete_tag("a")
    assert store.sweep_condemned() == 0
    store.delete_tag("copy")
    assert store.sweep_condemned() > 0


def test_the_bytes_of_a_resident_model_go_when_it_stops(store: Store) -> None:
    model = make_model(b"a")
    store.set_tag("a", put_model(store, model))
    resident = {model.digest}
    store.set_resident_roots(lambda: resident)
    store.delete_tag("a")
    assert store.sweep_condemned() == 0
    assert store.usage().blobs == 4
    resident.clear()
    assert store.sweep_condemned() > 0
    assert store.usage().blobs == 0


def test_a_removed_model_that_comes_back_is_not_swept(store: Store, clock: FakeClock) -> None:
    model = make_model(b"a")
    digest = put_model(store, model)
    store.set_tag("a", digest)
    store.delete_tag("a")
    store.set_tag("a", digest)
    assert store.sweep_condemned() == 0
    store.delete_tag("a")
    put_model(store, model)
    assert store.sweep_condemned() == 0, "put again, it waits for its tag"
    clock.now += 3601
    assert len(garbage(store)) == 4


def test_an_interrupted_removal_is_finished_at_the_next_start(root: Path, store: Store) -> None:
    store.set_tag("a", put_model(store, make_model(b"a")))
    store.delete_tag("a")
    store.close()
    with Store.open(root) as again:
        assert again.usage().blobs == 0


def test_what_vanished_by_itself_is_forgotten(root: Path, store: Store) -> None:
    digest = put_model(store, make_model(b"a"))
    for path in (root / "blobs" / "sha256").iterdir():
        path.unlink()
    assert garbage(store) == []
    with pytest.raises(BlobMissing):
        store.set_tag("a", digest)


# Imports


def at_rest(path: Path) -> Path:
    """Wait until the file's times are a moment old, so that they are believed."""
    deadline = time.monotonic() + 5
    while time.time_ns() - path.stat().st_ctime_ns < 50_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path


def test_a_file_is_copied(root: Path, store: Store, tmp_path: Path) -> None:
    data = os.urandom(5 << 20)
    source = plant(tmp_path / "x.gguf", data)
    seen: list[tuple[int, int]] = []
    digest, size_bytes = store.import_file(source, on_progress=lambda done, total: seen.append((done, total)))
    assert (digest, size_bytes) == (Digest.of(data), len(data))
    assert seen[0] == (0, len(data))
    assert seen[-1] == (len(data), len(data))
    assert seen == sorted(seen)
    source.write_bytes(b"changed later")
    assert store.blob_path(digest).read_bytes() == data
    assert stat.S_IMODE(source.stat().st_mode) & stat.S_IWUSR, "the user's file stays as it was"
    assert_store_is_right(root, store)


def test_a_file_nobody_may_write_is_linked(root: Path, store: Store, tmp_path: Path) -> None:
    source = plant(tmp_path / "x.gguf", b"weights")
    source.chmod(0o444)
    digest, _ = store.import_file(source)
    assert store.blob_path(digest).samefile(source)
    assert store.import_file(source) == (digest, 7)
    source.unlink()
    assert store.blob_path(digest).read_bytes() == b"weights"


@pytest.fixture
def sharing_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system whose files can share their blocks."""
    if os.geteuid() != 0 or shutil.which("mkfs.btrfs") is None:
        pytest.skip("reflinks need root and mkfs.btrfs to be tested")
    image, mount = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(128 << 20)
    mount.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"btrfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_file_shares_its_blocks_where_the_file_system_can(sharing_disk: Path) -> None:
    source = plant(sharing_disk / "x.gguf", os.urandom(1 << 20) * 16)
    with Store.open(sharing_disk / "store") as store:
        os.sync()
        before = store.usage().free_bytes
        digest, size_bytes = store.import_file(at_rest(source))
        assert before - store.usage().free_bytes < size_bytes // 4
        with source.open("r+b") as file:
            file.write(b"changed later")
        store.verify_blob(digest)
        assert garbage(store, grace_s=0) == [("blob", str(digest))]
        with pytest.raises(DigestMismatch):
            store.import_file(source, digest=digest)
        assert_store_is_right(store.root, store)


@pytest.mark.parametrize("mode", [0o644, 0o464, 0o446, 0o4444])
def test_a_file_that_may_change_is_not_linked(store: Store, tmp_path: Path, mode: int) -> None:
    source = plant(tmp_path / "x.gguf", b"weights")
    source.chmod(mode)
    digest, _ = store.import_file(source)
    assert not store.blob_path(digest).samefile(source)


def test_an_unchanged_file_is_not_read_again(store: Store, tmp_path: Path) -> None:
    source = at_rest(plant(tmp_path / "x.gguf", b"weights"))
    seen: list[int] = []
    store.import_file(source, on_progress=lambda done, total: seen.append(done))
    store.import_file(source, on_progress=lambda done, total: seen.append(done))
    assert seen == [0, 7, 7], "the second time, only the end is reported"


def test_a_linked_file_is_not_read_again(store: Store, tmp_path: Path) -> None:
    source = plant(tmp_path / "x.gguf", b"weights")
    source.chmod(0o400)
    at_rest(source)
    seen: list[int] = []
    for _ in range(2):
        store.import_file(source, on_progress=lambda done, total: seen.append(done))
    assert seen == [0, 7, 7]


def test_an_edit_that_keeps_size_and_modification_time_is_noticed(store: Store, tmp_path: Path) -> None:
    source = at_rest(plant(tmp_path / "x.gguf", b"weights"))
    before = source.stat()
    store.import_file(source)
    source.write_bytes(b"WEIGHTS")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.import_file(source) == (Digest.of(b"WEIGHTS"), 7)


def test_a_file_imported_before_its_blob_was_removed_comes_back(store: Store, tmp_path: Path) -> None:
    source = at_rest(plant(tmp_path / "x.gguf", b"weights"))
    digest, _ = store.import_file(source)
    assert garbage(store, grace_s=0) == [("blob", str(digest))]
    assert store.import_file(source) == (digest, 7)
    assert store.has_blob(digest, 7)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("missing", "no such file"),
        ("directory", "directory"),
        ("symlink", "symbolic link"),
        ("fifo", "FIFO"),
        ("device", "device"),
        ("socket", "socket"),
        ("empty", "empty"),
        ("proc", "empty"),
        ("nul", "NUL"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(store: Store, tmp_path: Path, kind: str, why: str) -> None:
    path = tmp_path / "x.gguf"
    if kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to(plant(tmp_path / "y.gguf", b"y"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "empty":
        path.touch()
    elif kind == "proc":
        path = Path("/proc/self/environ")
    elif kind == "nul":
        path = Path("a\0b")
    with pytest.raises(FileInvalid, match=why):
        store.import_file(path)
    assert store.usage().blobs == 0


@pytest.mark.parametrize("change", ["overwrite", "truncate", "append", "touch"])
@pytest.mark.parametrize("mode", [0o644, 0o444], ids=["copied", "linked"])
def test_a_file_that_changes_meanwhile_is_refused(
    root: Path, store: Store, tmp_path: Path, change: str, mode: int
) -> None:
    source = plant(tmp_path / "x.gguf", bytes(9 << 20))
    writer = os.open(source, os.O_RDWR)
    source.chmod(mode)
    at_rest(source)
    changed = False

    def interfere(done_bytes: int, total_bytes: int) -> None:
        nonlocal changed
        if done_bytes == 0 or changed:
            return
        changed = True
        if change == "overwrite":
            os.pwrite(writer, b"x", 0)
        elif change == "truncate":
            os.ftruncate(writer, 10)
        elif change == "append":
            os.pwrite(writer, b"x", 9 << 20)
        else:
            os.utime(source)

    with pytest.raises(FileChanged):
        store.import_file(source, on_progress=interfere)
    os.close(writer)
    assert store.usage().blobs == 0
    assert list((root / "ingest").iterdir()) == []


def test_an_import_can_be_cancelled_and_checked(root: Path, store: Store, tmp_path: Path) -> None:
    source = plant(tmp_path / "x.gguf", bytes(9 << 20))
    cancelled = threading.Event()
    with pytest.raises(PullCancelled):
        store.import_file(source, on_progress=lambda done, total: cancelled.set(), cancelled=cancelled)
    with pytest.raises(DigestMismatch):
        store.import_file(source, digest=Digest.of(b"something else"))
    assert store.usage().blobs == 0
    assert list((root / "ingest").iterdir()) == []
    assert store.import_file(source, digest=Digest.of(bytes(9 << 20)))


# Space and facts


def test_space_is_promised_once(store: Store) -> None:
    free_bytes = store.usage().free_bytes
    with pytest.raises(DiskFull) as caught:
        store.reserve(free_bytes + (1 << 40), "hf.co/org/huge")
    assert "hf.co/org/huge" in str(caught.value)
    half = free_bytes // 2
    with store.reserve(half, "first"):
        with pytest.raises(DiskFull):
            store.reserve(free_bytes - half, "second")
    store.reserve(half, "third").release()


def test_facts_are_remembered(root: Path, store: Store) -> None:
    assert store.recall("memory", "a") is None
    store.remember("memory", "a", "1")
    store.remember("memory", "a", "2")
    store.close()
    with Store.open(root) as again:
        assert again.recall("memory", "a") == "2"
        assert again.recall("threads", "a") is None


def test_usage_adds_up(store: Store) -> None:
    store.set_tag("a", put_model(store, make_model(b"12345")))
    with store.begin_ingest("k", total_bytes=None) as ingest:
        ingest.write(0, b"123")
        usage = store.usage()
    assert (usage.models, usage.blobs, usage.ingests, usage.ingest_bytes) == (1, 4, 1, 3)
    assert usage.blob_bytes == 5 + sum(map(len, make_model(b"12345").blobs[1:])) + len(make_model(b"12345").manifest)
    assert usage.free_bytes > 0


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(mount)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    assert os.statvfs(disk).f_bavail == 0


def write_until_full(ingest: Ingest) -> int:
    written = 0
    try:
        while True:
            ingest.write(written, bytes(1 << 20))
            ingest.note(written, 1 << 20)
            written += 1 << 20
    except DiskFull:
        return written


def test_a_model_can_be_removed_from_a_full_disk(small_disk: Path) -> None:
    root = small_disk / "store"
    with Store.open(root) as store:
        for name in ("a", "b"):
            store.set_tag(name, put_model(store, make_model(name.encode() * (1 << 20))))
        fill(small_disk)
        assert store.delete_tag("a") is not None
        assert store.sweep_condemned() > 1 << 20
        assert_store_is_right(root, store)
    with Store.open(root) as store:
        assert [tag.name for tag in store.list_tags()] == ["b"]
        fill(small_disk)
    with Store.open(root) as store:
        assert store.delete_tag("b") is not None
        store.sweep_condemned()
        assert store.usage().blobs == 0


def test_a_lease_that_ends_on_a_full_disk_protects_nothing_any_more(small_disk: Path) -> None:
    """The pull that fills the disk fails, and its lease ends with it.

    That cannot be written down on a full disk, so the lease once went on for a day: what the pull had brought could
    not be collected when the space was needed most.
    """
    with Store.open(small_disk / "store") as store:
        with store.lease("pull") as lease:
            lease.add(store.put_bytes(bytes(1 << 20)))
            fill(small_disk)
        assert [item.size_bytes for item in store.collect(grace_s=0)] == [1 << 20]


def test_garbage_can_be_collected_on_a_full_disk(small_disk: Path) -> None:
    with Store.open(small_disk / "store") as store:
        put_model(store, make_model(bytes(1 << 20)))
        fill(small_disk)
        assert len(list(store.collect(grace_s=0))) == 4


def test_a_full_disk_is_said_and_leaves_the_store_right(small_disk: Path, tmp_path: Path) -> None:
    root = small_disk / "store"
    source = plant(tmp_path / "big.gguf", bytes(20 << 20))
    plant(small_disk / "kept free", bytes(1 << 20))
    with Store.open(root) as store:
        with pytest.raises(DiskFull):
            store.import_file(source)
        with pytest.raises(DiskFull):
            store.reserve(20 << 20, "a pull")
        ingest = store.begin_ingest("k", total_bytes=20 << 20)
        written = write_until_full(ingest)
        assert ingest.received() == [(0, written)]
        ingest.close()
        with pytest.raises(DiskFull):
            store.put_bytes(bytes(4 << 20))
        assert_store_is_right(root, store)
    os.truncate(small_disk / "kept free", 0)
    with Store.open(root) as store:
        with store.begin_ingest("k", total_bytes=20 << 20) as ingest:
            assert ingest.received() == [(0, written)]
            ingest.discard()
        store.put_bytes(bytes(4 << 20))
        assert_store_is_right(root, store)
