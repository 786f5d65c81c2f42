"""What models can be loaded on, and how much memory is free there.

The daemon never loads the engine; whether that can use an accelerator shows in the libraries that lie beside it.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import structlog

log = structlog.get_logger(__name__)

#: cgroup v1 says "no limit" with the largest page-aligned number.
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class Device:
    """Something with memory that models are loaded on.

    Attributes:
        id: "cpu", or "cuda0" and on, numbered as the driver does (by PCI address).
        description: what it is, for people.
        total_bytes: what all of us may use: for "cpu" the smaller of the machine's memory and the cgroup's limit.
        free_bytes: of that, what is free or can be freed at once (page cache).
    """

    id: str
    description: str
    total_bytes: int
    free_bytes: int


def devices() -> list[Device]:
    """Return the machine's memory now, accelerators last. Blocks for milliseconds; thread-safe."""
    return [_cpu(), *_nvidia.devices()]


def _cpu() -> Device:
    memory = psutil.virtual_memory()
    total, free, where = memory.total, memory.available, "main memory"
    proc = Path("/proc/self/cgroup")
    limits = cgroup_limits(proc.read_text(), Path("/sys/fs/cgroup")) if proc.exists() else []
    for limit, used in limits:
        if limit < total:
            total, where = limit, "main memory, limited by the control group"
        free = min(free, max(limit - used, 0))
    return Device("cpu", where, total, min(free, total))


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


def engine_uses_cuda() -> bool:
    """Whether the installed engine was built for NVIDIA GPUs; found without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    locations = (spec.submodule_search_locations or []) if spec else []
    return any(any(Path(place, "lib").glob("*ggml-cuda*")) for place in locations)


class _Nvidia:
    """The NVIDIA driver, asked through its management library. No driver, and no GPU, are ordinary."""

    def __init__(self) -> None:
        #: Protects the first load; the library itself is thread-safe after that.
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._tried = False

    def devices(self) -> list[Device]:
        nvml = self._loaded()
        if nvml is None:
            return []
        found = []
        try:
            for number in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(number)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                name = nvml.nvmlDeviceGetName(handle)
                found.append(Device(f"cuda{number}", str(name), int(memory.total), int(memory.free)))
        except nvml.NVMLError as error:
            log.warning("nvidia_query_failed", error=str(error), devices=len(found))
        return found

    def _loaded(self) -> Any:
        with self._lock:
            if self._tried:
                return self._nvml
            self._tried = True
            import pynvml

            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError as error:
                log.debug("nvidia_driver_absent", error=str(error))
                return None
            if not engine_uses_cuda():
                log.warning("gpu_unused", count=pynvml.nvmlDeviceGetCount(), why="the engine is built without CUDA")
                return None
            self._nvml = pynvml
            return pynvml


_nvidia = _Nvidia()
