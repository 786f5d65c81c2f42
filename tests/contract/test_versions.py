"""The versions of a name: how they are counted, kept, collected, described and gone back to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.names import Names
from lmd.daemon.versions import Versions, VersionState
from lmd.registry.aliases import AliasTable
from lmd.registry.digest import Digest
from lmd.registry.errors import ModelNotFound, TagChanged, VersionNotFound
from lmd.registry.store import Store
from tests.support.created_models import add_model
from tests.support.stored_models import FakeClock, assert_store_is_right, make_model, put_model

DAY_S = 86400.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(time.time())


@pytest.fixture
def store(root: Path, clock: FakeClock) -> Iterator[Store]:
    with Store.open(root, clock=clock, grace_s=0, history_s=7 * DAY_S) as opened:
        yield opened


@pytest.fixture
def versions(store: Store) -> Iterator[Versions]:
    pool = BlockingPool(1)
    yield Versions(store, Names(store, AliasTable.load()), pool)
    pool.close()


def point(store: Store, name: str, weights: bytes, note: str = "create") -> Digest:
    """Point *name* at a model with these weights."""
    digest = put_model(store, make_model(weights))
    store.set_tag(name, digest, note=note)
    return digest


def swept(store: Store, **options: float) -> set[str]:
    return {item.digest_or_name for item in store.collect(**options)}  # type: ignore[arg-type]


def test_versions_are_counted_from_the_making_of_the_name(store: Store) -> None:
    first, second = point(store, "a", b"1", "pull"), point(store, "a", b"2", "edit")
    store.set_tag("A", second, note="again")
    listed = [(v.number, v.manifest, v.note, v.superseded_at is None) for v in store.tag_versions("a")]
    assert listed == [(1, first, "pull", False), (2, second, "edit", True)]
    store.delete_tag("a")
    assert store.tag_versions("a") == []
    again = point(store, "a", b"2")
    assert [(v.number, v.manifest) for v in store.tag_versions("a")] == [(1, again)]


def test_a_superseded_version_is_kept_for_its_time_and_no_longer(root: Path, store: Store, clock: FakeClock) -> None:
    first = point(store, "a", b"1")
    # However old it was when it was replaced.
    clock.now += 100 * DAY_S
    point(store, "a", b"2")
    clock.now += 7 * DAY_S - 1
    assert swept(store) == set()
    clock.now += 2
    assert swept(store) == {str(first), str(Digest.of(b"1"))}
    assert_store_is_right(root, store)


def test_a_collection_can_be_told_to_keep_versions_for_less_time(store: Store, clock: FakeClock) -> None:
    first = point(store, "a", b"1")
    point(store, "a", b"2")
    size_bytes = sum(store.blob_size(digest) for digest in (first, Digest.of(b"1")))
    assert store.usage().version_bytes == size_bytes
    clock.now += 60
    assert swept(store, history_s=61) == set()
    assert str(first) in swept(store, history_s=60)
    assert store.usage().version_bytes == 0


def test_removing_a_name_frees_its_versions_and_leaves_those_of_others(root: Path, store: Store) -> None:
    shared, own = point(store, "a", b"shared"), point(store, "a", b"own")
    store.set_tag("b", shared)
    point(store, "b", b"of b")
    store.delete_tag("a")
    assert store.sweep_condemned() > 0
    assert not store.has_blob(own, None)
    assert not store.has_blob(Digest.of(b"own"), None)
    assert store.has_blob(Digest.of(b"shared"), None), "an earlier version of b needs it"
    store.delete_tag("b")
    store.sweep_condemned()
    assert store.usage().blobs == 0
    assert_store_is_right(root, store)


def test_a_name_moves_only_from_where_it_is_expected_to_be(store: Store) -> None:
    first, second = point(store, "a", b"1"), point(store, "a", b"2")
    with pytest.raises(TagChanged, match="`a` was changed meanwhile") as caught:
        store.set_tag("a", first, expected=first)
    assert caught.value.metadata["actual"] == str(second)
    with pytest.raises(TagChanged, match="`b` was removed meanwhile"):
        store.set_tag("b", first, expected=first)
    assert store.get_tag("b") is None
    assert len(store.tag_versions("a")) == 2
    store.set_tag("a", first, expected=second)
    assert [version.manifest for version in store.tag_versions("a")] == [first, second, first]


def test_a_rebuilt_index_knows_the_present_version_and_counts_on(root: Path, store: Store, clock: FakeClock) -> None:
    point(store, "a", b"1")
    second = point(store, "a", b"2")
    store.close()
    (root / "index.db").write_bytes(b"ruined")
    with Store.open(root, clock=clock, history_s=DAY_S) as again:
        assert [(v.number, v.manifest, v.note) for v in again.tag_versions("a")] == [(1, second, "")]
        third = point(again, "a", b"3", "edit")
        assert [(v.number, v.manifest) for v in again.tag_versions("a")] == [(1, second), (2, third)]


async def test_each_version_tells_what_it_changed(store: Store, versions: Versions, tmp_path: Path) -> None:
    add_model(store, tmp_path, "a", more="PARAMETER temperature 0.5\nSYSTEM One.\n")
    add_model(store, tmp_path, "a", more="PARAMETER temperature 0.7\nPARAMETER stop x\nSYSTEM One.\n")
    add_model(store, tmp_path, "a", seed=2, more='SYSTEM """One.\nTwo."""\nTEMPLATE "{{ messages }}"\n')
    name, listed = await versions.of("a")
    assert name == "a:latest"
    assert [(item.version.number, item.state, item.change) for item in listed] == [
        (
            3,
            VersionState.CURRENT,
            "weights changed, template added, system +1 -0, 2 more",
        ),
        (2, VersionState.KEPT, 'stop "x", temperature 0.5 to 0.7'),
        (1, VersionState.KEPT, ""),
    ]
    with pytest.raises(ModelNotFound):
        await versions.of("b")


async def test_rolling_back_again_and_again_goes_back_further(store: Store, versions: Versions, tmp_path: Path) -> None:
    digests = [add_model(store, tmp_path, "a", more=f"SYSTEM {n}\n").manifest for n in range(3)]
    assert (await versions.rollback("a")).version == 2
    rolled = await versions.rollback("a")
    assert (rolled.version, rolled.tag.manifest) == (1, digests[0])
    with pytest.raises(VersionNotFound, match="no version before this one"):
        await versions.rollback("a")
    assert (await versions.rollback("a", 3)).tag.manifest == digests[2]
    notes = [version.note for version in store.tag_versions("a:latest")]
    assert notes[3:] == ["rollback to version 2", "rollback to version 1", "rollback to version 3"]
    # And what the name is at already makes no version.
    assert (await versions.rollback("a", 6)).version == 6
    assert len(store.tag_versions("a:latest")) == 6


@pytest.mark.parametrize("number", [3, -1, 2**31 - 1])
async def test_a_version_that_never_was(store: Store, versions: Versions, tmp_path: Path, number: int) -> None:
    for text in ("x", "y"):
        add_model(store, tmp_path, "a", more=f"SYSTEM {text}\n")
    with pytest.raises(VersionNotFound, match=f"`a:latest` has no version {number}"):
        await versions.rollback("a", number)


async def test_a_version_that_is_gone_is_listed_and_cannot_be_had(
    store: Store, versions: Versions, tmp_path: Path, clock: FakeClock
) -> None:
    for seed in (1, 2):
        add_model(store, tmp_path, "a", seed=seed)
    clock.now += 8 * DAY_S
    assert swept(store)
    _, listed = await versions.of("a")
    assert [(item.state, item.change) for item in listed] == [(VersionState.CURRENT, ""), (VersionState.GONE, "")]
    before = store.get_tag("a:latest")
    for number in (0, 1):
        with pytest.raises(VersionNotFound, match="version 1 of `a:latest` is no longer kept"):
            await versions.rollback("a", number)
    assert store.get_tag("a:latest") == before
