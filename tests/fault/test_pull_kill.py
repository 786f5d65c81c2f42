"""Pulls that are killed and file systems that fill up: what arrived is kept, and nothing wrong is ever stored."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lmd.registry.digest import Digest
from lmd.registry.errors import DiskFull
from lmd.registry.store import Store
from tests.support.gguf_file import make_gguf
from tests.support.hub import HubServer, NoRange, Trigger
from tests.support.pull_rig import QUICK, Rig, sha256_of

pytestmark = pytest.mark.fault

REPO = "test/big"
FILE = "big.Q8_0.gguf"
SIZE = 24 << 20
KILLS = 10
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / FILE
    path.write_bytes(make_gguf(SIZE))
    return path


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo(REPO, {FILE: model}, license=None)
        yield server


def start_pull(hub: HubServer, store: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.support.pull_child", str(store), hub.endpoint, f"hf.co/{REPO}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(child: subprocess.Popen[str]) -> list[dict[str, object]]:
    out, _ = child.communicate(timeout=DEADLINE_S)
    return [json.loads(line) for line in out.splitlines() if line.endswith("}")]


def lowest_offset(hub: HubServer) -> int:
    return min(r.byte_range[0] for r in hub.data_requests(FILE) if r.byte_range is not None)


@pytest.mark.parametrize("seed", [1, 20261121])
def test_kill_9_at_random_bytes_of_one_pull(hub: HubServer, model: Path, tmp_path: Path, seed: int) -> None:
    """The kill comes from the server's sending thread, at a byte that the seed picks, not at a time.

    What the dead process had received but not yet noted is at most what socket buffers and one buffer of ours hold.
    """
    offsets = random.Random(seed)
    store = tmp_path / "store"
    for kill in range(KILLS):
        child: list[subprocess.Popen[str]] = []
        started = threading.Event()

        def strike(child: list[subprocess.Popen[str]] = child, started: threading.Event = started) -> None:
            started.wait(DEADLINE_S)
            child[0].kill()
            child[0].wait(DEADLINE_S)

        # At least as much as may be under way, so that each try gets somewhere.
        step = offsets.randrange(6 << 20, 9 << 20) if kill == 0 else offsets.randrange(1 << 18, SIZE // (2 * KILLS))
        hub.requests.clear()
        hub.faults.clear()
        hub.fault(REPO, FILE, Trigger(hub.sent_bytes(REPO, FILE) + step, strike))
        child.append(start_pull(hub, store))
        started.set()
        finish(child[0])
        assert child[0].returncode == -9
        if kill > 0:
            assert lowest_offset(hub) > 0, "the pull after a kill starts where the last one was"

    hub.faults.clear()
    hub.requests.clear()
    events = finish(start_pull(hub, store))

    assert events[-1]["state"] == "TAG"
    assert lowest_offset(hub) > 0
    resumed = max(int(str(event.get("resumed", 0))) for event in events)
    assert resumed > 0
    with Store.open(store) as opened:
        digest = Digest.parse(sha256_of(model.read_bytes()))
        opened.verify_blob(digest)
        # What the leases of the dead still hold is all part of the model: nothing is left over.
        assert [item.digest_or_name for item in opened.collect(dry_run=True, grace_s=0)] == []


def test_kill_9_where_the_source_knows_no_ranges(hub: HubServer, model: Path, tmp_path: Path) -> None:
    child: list[subprocess.Popen[str]] = []
    started = threading.Event()

    def strike() -> None:
        started.wait(DEADLINE_S)
        child[0].kill()

    hub.fault(REPO, FILE, NoRange())
    hub.fault(REPO, FILE, Trigger(8 << 20, strike))
    child.append(start_pull(hub, tmp_path / "store"))
    started.set()
    finish(child[0])
    assert child[0].returncode == -9

    events = finish(start_pull(hub, tmp_path / "store"))

    assert events[-1]["state"] == "TAG"
    with Store.open(tmp_path / "store") as store:
        store.verify_blob(Digest.parse(sha256_of(model.read_bytes())))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with 16 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a file system")
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(where)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_disk_that_fills_up_keeps_what_arrived(model: Path, small_disk: Path) -> None:
    with HubServer() as hub:
        hub.add_repo("test/fits", {FILE: make_gguf(8 << 20)}, license=None)
        ballast = small_disk / "ballast"
        something_arrived = threading.Event()

        def fill() -> None:
            assert something_arrived.wait(DEADLINE_S)
            with ballast.open("wb") as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                        file.flush()
                except OSError:
                    pass

        rig = Rig(hub, small_disk / "store", replace(QUICK, join_after_s=3600.0))
        try:
            # Somebody else takes the rest of the disk in the middle of the transfer.
            hub.fault("test/fits", FILE, Trigger(3 << 20, fill))
            with pytest.raises(DiskFull) as caught:
                rig.pull("hf.co/test/fits", on_event=lambda e: something_arrived.set() if e.completed_bytes else None)
            assert caught.value.hint
            assert rig.store.list_tags() == []

            ballast.unlink()
            hub.faults.clear()
            rig.events.clear()
            rig.pull("hf.co/test/fits")
            assert max(event.resumed_bytes for event in rig.events) > 0
        finally:
            rig.close()


def test_a_model_larger_than_the_disk_is_refused_before_its_first_byte(hub: HubServer, small_disk: Path) -> None:
    rig = Rig(hub, small_disk / "store")
    try:
        with pytest.raises(DiskFull) as caught:
            rig.pull(f"hf.co/{REPO}")
        assert caught.value.needed_bytes >= SIZE
        assert caught.value.free_bytes < SIZE
        assert hub.data_requests(FILE) == []
    finally:
        rig.close()
