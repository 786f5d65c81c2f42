"""What programs use of a device: their own memory and that of their children, and nothing that the kernel can drop."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lmd.daemon.process_memory import ProcessTree, nvidia_process_bytes, used_bytes

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


def test_nothing_is_known_of_other_devices() -> None:
    with running(TAKES, "1") as tree:
        assert used_bytes(tree, "vulkan0") == 0


@dataclass
class Used:
    pid: int
    usedGpuMemory: int | None


class Driver:
    """Stands in for NVIDIA's library."""

    class NVMLError(Exception):
        pass

    def __init__(self, *used: Used) -> None:
        self.used = used
        self.opened = 0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        if number != 1:
            raise self.NVMLError("no such device")
        return number

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: int) -> Any:
        return self.used


def test_a_gpu_is_asked_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(TAKES, "1") as tree:
        driver = Driver(Used(tree.pid, 3 * MIB), Used(tree.pid + 100_000, 5 * MIB))
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        assert used_bytes(tree, "cuda1") == 3 * MIB
        assert used_bytes(tree, "cuda0") == 0
        assert driver.opened == 0


def test_a_driver_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(Used(1, None)))
    assert nvidia_process_bytes(1) == {}
