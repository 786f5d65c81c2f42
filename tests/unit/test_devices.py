from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from lmd.daemon.devices import main_memory
from lmd.daemon.devices.cpu import cgroup_limits

MIB = 1 << 20


def group(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def test_this_machine_has_memory() -> None:
    cpu = main_memory()
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


def test_asking_never_imports_the_engine() -> None:
    code = (
        "from lmd.daemon.devices import Inventory; i = Inventory(); i.devices(); i.shortfall(); "
        "import sys; print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"llama_cpp", "numpy", "jinja2"} & set(out)
