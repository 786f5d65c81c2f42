"""Saved KV as the daemon sees it: directories, a quota over all models, and runners that need time to save."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from lmd.daemon.residency.values import RunnerState
from lmd.daemon.saved_kv import SavedKv
from lmd.registry.digest import Digest
from lmd.registry.store import Store
from tests.support.leaks import until
from tests.support.residents import SETTINGS, Threads, World

A, B, C = (Digest.of(name) for name in (b"a", b"b", b"c"))
ENGINE = "0.3.36"


class Kept:
    """Saved KV of the models *named*, of which *resident* are loaded."""

    def __init__(self, root: Path, quota_bytes: int = 1000) -> None:
        self.root = root
        self.saved = SavedKv(root, quota_bytes, ENGINE, Threads())
        self.named, self.resident = {A, B, C}, set[Digest]()
        self.saved.named = lambda: self.named
        self.saved.resident = lambda: self.resident

    async def add(self, manifest: Digest, name: str, size_bytes: int, used_at: float, engine: str = ENGINE) -> Path:
        directory = await self.saved.prepare(manifest, engine, "ctx4096-slots4-cpu")
        assert directory is not None
        path = directory / name
        path.write_bytes(bytes(size_bytes))
        os.utime(path, (used_at, used_at))
        return path

    async def tidied(self) -> set[str]:
        """Tidy, and return the names of all files left."""
        self.saved.tidy_soon()
        await self.saved.stop()
        return {path.name for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "kv")


async def test_a_directory_for_each_model_engine_and_settings(kept: Kept) -> None:
    first = await kept.saved.prepare(A, ENGINE, "ctx4096-slots4-cpu")
    assert first == kept.root / A.hex / "0.3.36-ctx4096-slots4-cpu"
    others = [
        await kept.saved.prepare(B, ENGINE, "ctx4096-slots4-cpu"),
        await kept.saved.prepare(A, "0.3.37", "ctx4096-slots4-cpu"),
        await kept.saved.prepare(A, ENGINE, "ctx8192-slots4-cpu"),
    ]
    assert len({first, *others}) == 4
    for path in (kept.root, first.parent, first):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert await kept.saved.prepare(A, ENGINE, "ctx4096-slots4-cpu") == first


async def test_what_a_runner_says_of_itself_leads_nowhere_else(kept: Kept) -> None:
    path = await kept.saved.prepare(A, "../../../etc", "x/y")
    assert path is not None
    assert path.parent == kept.root / A.hex
    assert path.is_dir()


async def test_a_quota_of_zero_keeps_nothing_and_removes_what_was_kept(kept: Kept) -> None:
    await kept.add(A, "1.kv", 10, 1)
    off = Kept(kept.root, quota_bytes=0)
    assert await off.saved.prepare(A, ENGINE, "ctx") is None
    assert await off.tidied() == set()
    assert list(kept.root.iterdir()) == []


async def test_the_least_recently_used_of_all_models_go_first(kept: Kept) -> None:
    await kept.add(A, "a1.kv", 400, 1)
    await kept.add(B, "b2.kv", 400, 2)
    await kept.add(A, "a3.kv", 400, 3)
    assert await kept.saved.total_bytes() == 1200
    assert await kept.tidied() == {"b2.kv", "a3.kv"}
    await kept.add(C, "c4.kv", 900, 4)
    kept.resident = {A, B}  # a runner does without
    assert await kept.tidied() == {"c4.kv"}
    assert await kept.saved.total_bytes() == 900


async def test_what_fits_stays(kept: Kept) -> None:
    await kept.add(A, "a.kv", 500, 1)
    await kept.add(B, "b.kv", 500, 2)
    assert await kept.tidied() == {"a.kv", "b.kv"}


async def test_models_without_a_name_leave_nothing(kept: Kept) -> None:
    await kept.add(A, "a.kv", 1, 1)
    await kept.add(B, "b.kv", 1, 1)
    await kept.add(C, "c.kv", 1, 1)
    kept.named, kept.resident = {A}, {B}
    assert await kept.tidied() == {"a.kv", "b.kv"}
    assert not (kept.root / C.hex).exists()
    kept.resident = set()
    assert await kept.tidied() == {"a.kv"}


async def test_directories_of_other_engines_go(kept: Kept) -> None:
    await kept.add(A, "old.kv", 1, 1, engine="0.3.35")
    await kept.add(A, "longer.kv", 1, 1, engine="0.3.361")
    await kept.add(A, "new.kv", 1, 1)
    assert await kept.tidied() == {"new.kv"}


async def test_unfinished_files_of_dead_runners_go(kept: Kept) -> None:
    await kept.add(A, "a.tmp", 10, 1)
    await kept.add(B, "b.tmp", 2000, 1)
    kept.resident = {B}  # it may be writing this very moment
    assert await kept.tidied() == {"b.tmp"}
    assert not (kept.root / A.hex).exists()


async def test_what_is_not_ours_stays_and_links_are_not_followed(kept: Kept, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "0.3.36-ctx").mkdir(parents=True)
    (elsewhere / "0.3.36-ctx" / "precious.kv").write_bytes(bytes(5000))
    kept.root.mkdir()
    (kept.root / B.hex).symlink_to(elsewhere)
    (kept.root / C.hex).mkdir()
    (kept.root / C.hex / "0.3.35-ctx").symlink_to(elsewhere / "0.3.36-ctx")
    (kept.root / "notes").mkdir()
    (kept.root / "notes" / "mine").write_text("mine")
    kept.named = set()
    await kept.tidied()
    assert (elsewhere / "0.3.36-ctx" / "precious.kv").exists()
    assert (kept.root / "notes" / "mine").exists()


async def test_no_directory_no_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = Kept(tmp_path / "file" / "kv")
    assert await kept.saved.prepare(A, ENGINE, "ctx") is None
    assert await kept.saved.total_bytes() == 0
    assert await kept.tidied() == set()
    assert await Kept(tmp_path / "never made").tidied() == set()


async def test_the_store_takes_no_notice_of_it(tmp_path: Path) -> None:
    """Recovery, collection and usage see blobs and names, whatever lies in the directory of the cache."""
    with Store.open(tmp_path / "store") as store:
        kept = Kept(store.root / "kv")
        path = await kept.add(A, "a.kv", 100, 1)
        before = store.usage()
    with Store.open(tmp_path / "store") as store:
        assert [item.digest_or_name for item in store.collect(grace_s=0)] == []
        assert replace(store.usage(), free_bytes=0) == replace(before, free_bytes=0)
    assert path.exists()


# Runners that save


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    made.saved_kv = SavedKv(tmp_path / "kv", 1 << 20, "fake", Threads())
    yield made
    await made.close()


def saves(world: World) -> list[str]:
    return [line for line in world.loads() if line.startswith("save")]


async def test_a_runner_gets_the_time_it_needs_to_save(world: World) -> None:
    """It answers nobody while it saves: once the daemon took such a runner for stuck after `term_s`."""
    gate = world.path / "saved"
    model = world.model("a", journal=world.journal(), saving_until=str(gate))
    await world.ask(model, "x")
    leaving = asyncio.create_task(world.residency.unload(model.name, force=False))
    await until(lambda: saves(world) == ["save 10000"])
    await asyncio.wait([leaving], timeout=4 * world.timings.term_s)
    assert world.state(model) is RunnerState.DRAINING
    gate.touch()
    await leaving
    assert world.state(model) is None
    (directory,) = (world.path / "kv" / model.manifest_digest.hex).iterdir()
    assert directory.name == "fake-ctx1024-slots2-cpu-f16"
    assert (directory / "00.kv").exists()


async def test_a_runner_that_saves_for_too_long_is_ended(world: World) -> None:
    world.limits = replace(world.limits, save_s=0.1)
    model = world.model("a", journal=world.journal(), saving_until="/never", obeys_term=False)
    await world.ask(model, "x")
    await world.residency.unload(model.name, force=False)
    assert saves(world) == ["save 100"]
    assert world.state(model) is None


async def test_what_is_forced_or_removed_saves_nothing(world: World) -> None:
    model = world.model("a", journal=world.journal(), saving_until="/never")
    await world.ask(model, "x")
    await world.residency.unload(model.name, force=True)
    await world.ask(model, "x")
    await world.residency.unload_if_resident(model.manifest_digest)
    assert saves(world) == []
    assert world.state(model) is None


async def test_it_saves_again_after_a_removal_that_was_undone(world: World) -> None:
    gate = world.path / "saved"
    gate.touch()
    model = world.model("a", journal=world.journal(), saving_until=str(gate))
    await world.ask(model, "x")
    await world.residency.unload_if_resident(model.manifest_digest)
    await world.ask(model, "x")
    await world.residency.unload(model.name, force=False)
    assert saves(world) == ["save 10000"]


async def test_eviction_reload_and_shutdown_save(world: World) -> None:
    gate = world.path / "saved"
    gate.touch()
    world.free_bytes = 1500
    a = world.model("a", journal=world.journal(), saving_until=str(gate))
    b = world.model("b", journal=world.journal(), saving_until=str(gate))
    await world.ask(a, "x")
    await world.ask(b, "x")
    assert len(saves(world)) == 1
    await world.ask(b, "x", replace(SETTINGS, num_ctx=2048))
    assert len(saves(world)) == 2
    await world.residency.stop()
    assert len(saves(world)) == 3
    assert {path.name for path in (world.path / "kv" / b.manifest_digest.hex).iterdir()} == {
        "fake-ctx1024-slots2-cpu-f16",
        "fake-ctx2048-slots2-cpu-f16",
    }


async def test_without_a_quota_nothing_is_saved(world: World) -> None:
    world.saved_kv = SavedKv(world.path / "kv", 0, "fake", Threads())
    model = world.model("a", journal=world.journal(), saving_until="/never")
    await world.ask(model, "x")
    await world.residency.unload(model.name, force=False)
    assert saves(world) == []
    assert not (world.path / "kv").exists()
