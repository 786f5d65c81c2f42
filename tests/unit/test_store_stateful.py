"""The store against a model of it: any order of puts, tags, leases, removals, collections, crashes and boots."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing
from lmd.registry.store import Lease, Store
from tests.support.stored_models import FakeClock, assert_store_is_right, blob_file, make_model

# Every two neighbours share a blob, and all share their configuration.
MODELS = [make_model(f"weights {number}".encode(), f"weights {number + 1}".encode()) for number in range(4)]
BLOBS = {Digest.of(blob): blob for model in MODELS for blob in model.blobs}
MANIFESTS = {model.digest: model for model in MODELS}
NAMES = ["a:latest", "B:latest", "hf.co/Org/Repo:Q4_K_M"]
GRACE_S = 3600.0
HISTORY_S = 7200.0
TTL_S = 86400.0

names = st.sampled_from(NAMES)
models = st.sampled_from(MODELS)
blobs = st.sampled_from(sorted(BLOBS))


class StoreMachine(RuleBasedStateMachine):
    """Knows what the store must have, and what it must not have any more."""

    @initialize()
    def begin(self) -> None:
        fast = Path("/dev/shm")  # Syncing is not what is tested here.
        self.directory = Path(tempfile.mkdtemp(dir=fast if fast.is_dir() else None))
        self.root = self.directory / "store"
        self.clock = FakeClock(time.time())
        self.store = Store.open(self.root, clock=self.clock, grace_s=GRACE_S, history_s=HISTORY_S, boot_id="boot")
        self.tags: dict[str, Digest] = {}
        # What tags pointed to before, and until when.
        self.versions: dict[str, list[tuple[Digest, float]]] = {}
        # Present blobs, and since when; known manifests likewise.
        self.present: dict[Digest, float] = {}
        self.known: dict[Digest, float] = {}
        self.condemned: set[Digest] = set()
        self.lease: Lease | None = None
        self.leased: set[Digest] = set()
        # Leases of processes that died: whose they were, when they expire, and what they protect.
        self.orphaned: list[tuple[str, float, set[Digest]]] = []
        self.residents: set[Digest] = set()
        self.store.set_resident_roots(lambda: self.residents)
        self.received = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.directory)

    def spared_versions(self, history_s: float = HISTORY_S) -> set[Digest]:
        return {
            manifest
            for versions in self.versions.values()
            for manifest, until in versions
            if self.clock.now - until < history_s
        }

    def needed(
        self, grace_s: float, *, without: set[Digest] | None = None, history_s: float = HISTORY_S
    ) -> set[Digest]:
        roots = set(self.tags.values()) | self.residents | self.leased | self.spared_versions(history_s)
        for _, expires_at, digests in self.orphaned:
            if expires_at > self.clock.now:
                roots |= digests
        roots |= {
            manifest
            for manifest, since in self.known.items()
            if manifest not in (without or ()) and self.clock.now - since < grace_s
        }
        reached = set(roots)
        for manifest in roots & self.known.keys():
            reached |= set(MANIFESTS[manifest].blob_digests)
        return reached

    def lose(self, gone: set[Digest]) -> None:
        for digest in gone:
            self.present.pop(digest, None)
            self.known.pop(digest, None)

    @rule(digest=blobs)
    def put_a_blob(self, digest: Digest) -> None:
        assert self.store.put_bytes(BLOBS[digest]) == digest
        self.present[digest] = self.clock.now
        self.condemned.discard(digest)

    @rule(digest=blobs)
    def ingest_a_blob(self, digest: Digest) -> None:
        data = BLOBS[digest]
        with self.store.begin_ingest(str(digest), total_bytes=len(data)) as ingest:
            ingest.write(0, data)
            ingest.note(0, len(data))
            ingest.commit(digest, len(data))
        self.present[digest] = self.clock.now
        self.condemned.discard(digest)

    @rule(model=models)
    def put_a_manifest(self, model: object) -> None:
        chosen = next(each for each in MODELS if each is model)
        if not set(chosen.blob_digests) <= self.present.keys():
            with pytest.raises(BlobMissing):
                self.store.put_manifest(chosen.manifest)
            return
        assert self.store.put_manifest(chosen.manifest) == chosen.digest
        self.present[chosen.digest] = self.known[chosen.digest] = self.clock.now
        self.condemned -= {chosen.digest, *chosen.blob_digests}

    @rule(model=models)
    def put_a_whole_model(self, model: object) -> None:
        chosen = next(each for each in MODELS if each is model)
        for digest in chosen.blob_digests:
            self.put_a_blob(digest)
        self.put_a_manifest(chosen)

    @rule(name=names, model=models)
    def set_a_tag(self, name: str, model: object) -> None:
        digest = next(each for each in MODELS if each is model).digest
        whole = digest in self.known and {digest, *MANIFESTS[digest].blob_digests} <= self.present.keys()
        if not whole:
            with pytest.raises(BlobMissing):
                self.store.set_tag(name, digest)
            return
        self.store.set_tag(name.upper() if name.startswith("a") else name, digest)
        before = self.tags.get(name, digest)
        if before != digest:
            self.versions.setdefault(name, []).append((before, self.clock.now))
        self.tags[name] = digest
        self.condemned -= {digest, *MANIFESTS[digest].blob_digests}

    @rule(name=names)
    def delete_a_tag(self, name: str) -> None:
        record = self.store.delete_tag(name)
        assert (record.manifest if record else None) == self.tags.get(name)
        if name in self.tags:
            for digest in {self.tags.pop(name), *(manifest for manifest, _ in self.versions.pop(name, ()))}:
                # What a version that is gone referred to, nobody knows any more.
                blobs_of = MANIFESTS[digest].blob_digests if digest in self.known else ()
                self.condemned |= {digest, *blobs_of}

    @rule()
    def sweep(self) -> None:
        self.store.sweep_condemned()
        self.forget_condemned()

    def forget_condemned(self) -> None:
        gone = self.condemned - self.needed(GRACE_S, without=self.condemned)
        tagged = set(self.tags.values()) | (self.spared_versions() & self.known.keys())
        tagged |= {blob for manifest in tagged for blob in MANIFESTS[manifest].blob_digests}
        self.condemned -= gone | tagged
        self.lose(gone)

    @rule(
        grace_s=st.sampled_from([0.0, 60.0, GRACE_S]),
        history_s=st.sampled_from([0.0, 60.0, HISTORY_S]),
        dry_run=st.booleans(),
    )
    def collect(self, grace_s: float, history_s: float, dry_run: bool) -> None:
        needed = self.needed(grace_s, history_s=history_s)
        expected = {
            digest
            for digest, since in self.present.items()
            if digest not in needed and not (grace_s and self.clock.now - since < grace_s)
        }
        collection = self.store.collect(dry_run=dry_run, grace_s=grace_s, history_s=history_s)
        found = {item.digest_or_name for item in collection if item.kind == "blob"}
        assert found == {str(digest) for digest in expected}
        kept = self.present.keys() - expected - self.needed(0, history_s=history_s)
        assert collection.spared_items >= len(kept)
        if not dry_run:
            self.lose(expected)

    @precondition(lambda self: self.lease is None)
    @rule(owner=st.sampled_from("ab"), digests=st.sets(st.sampled_from(sorted([*BLOBS, *MANIFESTS])), max_size=4))
    def take_a_lease(self, owner: str, digests: set[Digest]) -> None:
        self.lease = self.store.lease(owner, TTL_S)
        self.lease.add(*digests)
        self.leased = set(digests)
        self.leased_until = self.clock.now + TTL_S

    @precondition(lambda self: self.lease is not None)
    @rule()
    def release_the_lease(self) -> None:
        assert self.lease is not None
        self.lease.release()
        self.orphaned = [orphan for orphan in self.orphaned if orphan[0] != self.lease.owner]
        self.lease, self.leased = None, set()

    @rule(manifests=st.sets(st.sampled_from(sorted(MANIFESTS)), max_size=2))
    def make_resident(self, manifests: set[Digest]) -> None:
        self.residents = manifests

    @rule(seconds=st.sampled_from([1.0, 61.0, GRACE_S + 1, TTL_S + 1]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(length=st.integers(1, 20), checkpoint=st.booleans(), boot=st.booleans())
    def work_on_an_ingest(self, length: int, checkpoint: bool, boot: bool) -> None:
        with self.store.begin_ingest("https://host/long", total_bytes=None) as ingest:
            durable = start = ingest.received_bytes
            ingest.write(start, bytes(length))
            ingest.note(start, length)
            if checkpoint:
                ingest.checkpoint()
                durable += length
        if boot:
            self.restart("another boot")
            with self.store.begin_ingest("https://host/long", total_bytes=None) as ingest:
                assert ingest.received_bytes <= (durable if not checkpoint else start + length)
            self.restart("boot")

    @rule()
    def crash(self) -> None:
        self.restart("boot")

    def restart(self, boot_id: str) -> None:
        """Lose the process: the lease stays until it expires, the residents are gone, removals are finished."""
        if self.lease is not None:
            self.orphaned.append((self.lease.owner, self.leased_until, self.leased))
            self.lease, self.leased = None, set()
        self.residents = set()
        self.store.close()
        self.store = Store.open(self.root, clock=self.clock, grace_s=GRACE_S, history_s=HISTORY_S, boot_id=boot_id)
        self.store.set_resident_roots(lambda: self.residents)
        self.forget_condemned()

    @rule(digest=blobs)
    def damage_a_blob_nobody_names(self, digest: Digest) -> None:
        named = set(self.tags.values())
        named |= {blob for manifest in named for blob in MANIFESTS[manifest].blob_digests}
        if digest in self.present and digest not in named:
            path = blob_file(self.root, digest)
            path.unlink()
            path.write_bytes(b"damaged")
            assert not self.store.has_blob(digest, None)
            self.present.pop(digest)

    @invariant()
    def everything_is_there(self) -> None:
        if not hasattr(self, "store"):
            return
        assert {tag.name.lower(): tag.manifest for tag in self.store.list_tags()} == {
            name.lower(): digest for name, digest in self.tags.items()
        }
        for digest in [*BLOBS, *MANIFESTS]:
            assert self.store.has_blob(digest, None) == (digest in self.present)
        assert_store_is_right(self.root, self.store)


# It waits for the disk thousands of times, which takes a minute on a busy one.
TestStoreMachine = pytest.mark.timeout(300)(StoreMachine.TestCase)
TestStoreMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
