"""The machine's own memory: what all of us may use of it, and how much is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from lmd.daemon.devices.values import CPU, Device

#: cgroup v1 says "no limit" with the largest page-aligned number.
_UNLIMITED = 1 << 60


def main_memory() -> Device:
    """Return the machine's memory now: the smaller of what it has and what the control groups allow.

    Blocks for less than a millisecond; thread-safe.
    """
    memory = psutil.virtual_memory()
    total, free, where = memory.total, memory.available, "main memory"
    proc = Path("/proc/self/cgroup")
    limits = cgroup_limits(proc.read_text(), Path("/sys/fs/cgroup")) if proc.exists() else []
    for limit, used in limits:
        if limit < total:
            total, where = limit, "main memory, limited by the control group"
        free = min(free, max(limit - used, 0))
    return Device(CPU, where, total, min(free, total))


def cgroup_limits(membership: str, mount: Path) -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of every control group above this process that has a limit.

    *membership* is the text of /proc/self/cgroup. Memory that the kernel can drop at once (clean page cache) does not
    count as used: model files that were read are such.

    Source: cgroups(7); Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    paths: dict[str, str] = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    if "memory" in paths:
        base, limit_file, used_file, cache_key = (
            mount / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_",
        )
        path = paths["memory"]
    elif "" in paths:
        base, limit_file, used_file, cache_key = mount, "memory.max", "memory.current", ""
        path = paths[""]
    else:
        return []
    found = []
    for group in _upwards(base, path):
        limit = _number(group / limit_file)
        used = _number(group / used_file)
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        found.append((limit, max(used - _stat(group / "memory.stat", f"{cache_key}inactive_file"), 0)))
    return found


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """Yield the groups from the process's own up to the root; in a container the path may not be visible."""
    group = base / path.lstrip("/")
    if ".." in group.parts or not group.is_dir():
        group = base
    while True:
        yield group
        if group == base:
            return
        group = group.parent


def _number(file: Path) -> int | None:
    """Return the number in *file*; None when there is none: no such file, or "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _stat(file: Path, key: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
