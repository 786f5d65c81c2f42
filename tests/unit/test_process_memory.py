"""What programs use of a device: their own memory and that of their children, and nothing that the kernel can drop."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lmd.daemon.errors import PermissionDenied
from lmd.daemon.process_memory import ProcessTree, drm_process_bytes, nvidia_process_bytes, used_bytes
from lmd.registry.errors import InvalidRequest

MIB = 1 << 20

#: Takes some of its memory for good, and says so; in a child of its own when there is a second argument.
TAKES = """
import mmap, os, subprocess, sys
if len(sys.argv) > 2:
    subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]])
else:
    kept = bytearray(os.urandom(1 << 20)) * int(sys.argv[1])
    print("taken", flush=True)
    sys.stdin.readline()
"""

MAPS = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    kept = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(kept[::4096])
print("taken", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def running(code: str, *args: str) -> Iterator[ProcessTree]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        tree = ProcessTree.of(process.pid)
        assert tree is not None
        yield tree
    finally:
        process.communicate("\n", timeout=30)


def test_a_program_uses_what_it_took() -> None:
    with running(TAKES, "64") as large, running(TAKES, "1") as small:
        assert used_bytes(large, "cpu") - used_bytes(small, "cpu") == pytest.approx(63 * MIB, abs=4 * MIB)
        assert large.uid == os.getuid()


def test_its_children_belong_to_it() -> None:
    with running(TAKES, "64", TAKES) as tree:
        assert used_bytes(tree, "cpu") > 64 * MIB


def test_a_mapped_file_can_be_dropped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 * MIB))
    with running(MAPS, str(tmp_path / "file")) as tree:
        assert used_bytes(tree, "cpu") < 48 * MIB


def test_a_program_that_has_ended_uses_nothing() -> None:
    with running(TAKES, "1") as tree:
        assert used_bytes(tree, "cpu") > 0
    assert used_bytes(tree, "cpu") == 0
    assert ProcessTree.of(tree.pid) is None


def test_another_program_with_its_number_is_not_taken_for_it() -> None:
    with running(TAKES, "1") as tree:
        assert used_bytes(replace(tree, created=tree.created - 5), "cpu") == 0


@pytest.mark.parametrize("pid", [-1, 1 << 40])
def test_no_such_process(pid: int) -> None:
    assert ProcessTree.of(pid) is None


def test_a_process_of_somebody_else_cannot_be_named() -> None:
    mine = os.getuid()
    assert ProcessTree.owned(os.getpid(), mine).pid == os.getpid()
    assert ProcessTree.owned(os.getpid(), 0).pid == os.getpid()
    with pytest.raises(PermissionDenied):
        ProcessTree.owned(os.getpid(), mine + 1)
    with pytest.raises(InvalidRequest) as caught:
        ProcessTree.owned(1 << 22, mine)
    assert caught.value.metadata["field"] == "pid"


CARD, OTHER_CARD = "0000:c1:00.0", "0000:c2:00.0"


def test_nothing_is_known_of_a_device_without_an_address() -> None:
    with running(TAKES, "1") as tree:
        assert used_bytes(tree, "metal0") == 0


@dataclass
class Used:
    pid: int
    usedGpuMemory: int | None


class Driver:
    """Stands in for NVIDIA's library."""

    class NVMLError(Exception):
        pass

    def __init__(self, computing: list[Used], drawing: list[Used]) -> None:
        self.computing = computing
        self.drawing = drawing
        self.opened = 0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        if bus_id != CARD:
            raise self.NVMLError("no such device")
        return bus_id

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: str) -> list[Used]:
        return self.computing

    def nvmlDeviceGetGraphicsRunningProcesses(self, _handle: str) -> list[Used]:
        return self.drawing


def test_a_gpu_is_asked_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(TAKES, "1") as tree:
        mine = Used(tree.pid, 3 * MIB)
        driver = Driver([mine, Used(tree.pid + 100_000, 5 * MIB)], [mine])
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        assert used_bytes(tree, "cuda0", CARD) == 3 * MIB
        assert used_bytes(tree, "cuda1", OTHER_CARD) == 0
        assert driver.opened == 0


def test_a_driver_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver([Used(1, None)], []))
    assert nvidia_process_bytes(CARD) == {1: 0}


AMDGPU = """pos:	0
drm-driver:	amdgpu
drm-client-id:	{client}
drm-pdev:	{bus_id}
drm-memory-vram:	{kib} KiB
drm-resident-vram:	{kib} KiB
drm-total-vram:	999999 KiB
drm-memory-gtt:	777 KiB
"""
XE = """drm-driver:	xe
drm-client-id:	{client}
drm-pdev:	{bus_id}
drm-resident-vram0:	3 MiB
drm-resident-vram1:	2 MiB
drm-resident-system:	50 MiB
"""
I915 = """drm-driver:	i915
drm-client-id:	{client}
drm-pdev:	{bus_id}
drm-resident-local0:	512
"""


def fdinfo(proc: Path, pid: int, *texts: str) -> None:
    place = proc / str(pid) / "fdinfo"
    place.mkdir(parents=True)
    for number, text in enumerate(["pos:	0\nflags:	02\n", *texts]):
        (place / str(number)).write_text(text)


def test_the_kernels_drivers_tell_it_in_each_open_file(tmp_path: Path) -> None:
    fdinfo(tmp_path, 10, AMDGPU.format(client=1, bus_id=CARD, kib=100), XE.format(client=2, bus_id=CARD))
    fdinfo(tmp_path, 11, I915.format(client=3, bus_id=CARD), AMDGPU.format(client=4, bus_id=OTHER_CARD, kib=9))
    assert drm_process_bytes([10, 11, 12], CARD, tmp_path) == (100 << 10) + 5 * MIB + 512
    assert drm_process_bytes([11], OTHER_CARD, tmp_path) == 9 << 10


def test_a_client_with_several_files_or_processes_counts_once(tmp_path: Path) -> None:
    client = AMDGPU.format(client=1, bus_id=CARD, kib=100)
    fdinfo(tmp_path, 10, client, client)
    fdinfo(tmp_path, 11, client)
    assert drm_process_bytes([10, 11], CARD, tmp_path) == 100 << 10
