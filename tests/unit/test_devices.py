from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmd.daemon import devices as module
from lmd.daemon.devices import cgroup_limits, devices

MIB = 1 << 20


def group(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def test_this_machine_has_memory() -> None:
    cpu = devices()[0]
    assert cpu.id == "cpu"
    assert 0 < cpu.free_bytes <= cpu.total_bytes <= psutil.virtual_memory().total


def test_v2_limits_of_all_ancestors_count(tmp_path: Path) -> None:
    group(tmp_path / "a", memory__max=800 * MIB, memory__current=300 * MIB, memory__stat="anon 1\ninactive_file 0")
    group(
        tmp_path / "a" / "b",
        memory__max=500 * MIB,
        memory__current=200 * MIB,
        memory__stat=f"inactive_file {50 * MIB}\nfile 7",
    )
    group(tmp_path / "a" / "b" / "c", memory__max="max", memory__current=MIB)
    assert cgroup_limits("0::/a/b/c", tmp_path) == [(500 * MIB, 150 * MIB), (800 * MIB, 300 * MIB)]


def test_v1_limits(tmp_path: Path) -> None:
    base = tmp_path / "memory"
    group(base, memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=7)
    group(
        base / "docker",
        memory__limit_in_bytes=100 * MIB,
        memory__usage_in_bytes=60 * MIB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {10 * MIB}",
    )
    assert cgroup_limits("5:cpu,cpuacct:/x\n4:memory:/docker\n0::/", tmp_path) == [(100 * MIB, 50 * MIB)]


def test_a_group_that_the_container_cannot_see_falls_back_to_the_root_it_has(tmp_path: Path) -> None:
    group(tmp_path, memory__max=64 * MIB, memory__current=MIB)
    assert cgroup_limits("0::/kubepods/pod1/x", tmp_path) == [(64 * MIB, MIB)]
    assert cgroup_limits("0::/../../other", tmp_path) == [(64 * MIB, MIB)]


def test_no_groups_no_limits(tmp_path: Path) -> None:
    assert cgroup_limits("", tmp_path) == []
    assert cgroup_limits("0::/", tmp_path) == []


class FakeNvml(types.SimpleNamespace):
    """Stands in for the driver, which a test machine need not have."""

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.gpus = gpus

    def nvmlInit(self) -> None:
        if not self.gpus:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        if self.gpus[number][1] == 0:
            raise self.NVMLError("GPU is lost")
        return number

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(total=self.gpus[handle][1], free=self.gpus[handle][2])

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.gpus[handle][0]


def gpus(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, *, cuda: bool) -> list[tuple[str, str, int, int]]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(module, "engine_uses_cuda", lambda: cuda)
    monkeypatch.setattr(module, "_nvidia", module._Nvidia())
    return [(d.id, d.description, d.total_bytes, d.free_bytes) for d in devices()[1:]]


def test_gpus_are_numbered_as_the_driver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([("NVIDIA H200", 141, 140), ("NVIDIA L4", 24, 3)])
    assert gpus(monkeypatch, nvml, cuda=True) == [("cuda0", "NVIDIA H200", 141, 140), ("cuda1", "NVIDIA L4", 24, 3)]


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus(monkeypatch, FakeNvml([]), cuda=True) == []


def test_a_gpu_that_the_engine_cannot_use_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus(monkeypatch, FakeNvml([("NVIDIA H200", 141, 140)]), cuda=False) == []


def test_a_gpu_that_fails_does_not_hide_the_ones_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([("NVIDIA L4", 24, 3), ("broken", 0, 0)])
    assert gpus(monkeypatch, nvml, cuda=True) == [("cuda0", "NVIDIA L4", 24, 3)]


def test_asking_never_imports_the_engine() -> None:
    code = (
        "from lmd.daemon.devices import devices, engine_uses_cuda as u; u(), devices(); import sys; print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"llama_cpp", "numpy", "jinja2"} & set(out)
