"""What a process and its children use of a device's memory.

For programs that are not ours: the machine's figures show what they took, and a lease must not count it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil
import structlog

log = structlog.get_logger(__name__)

_CUDA = re.compile(r"cuda(\d{1,4})")


@dataclass(frozen=True, slots=True)
class ProcessTree:
    """A process and its descendants; *created* tells it from another one that gets its number later."""

    pid: int
    created: float
    uid: int

    @classmethod
    def of(cls, pid: int) -> ProcessTree | None:
        """Return the tree of a process that exists now; None when there is no such process, or none that we may see."""
        try:
            process = psutil.Process(pid)
            return cls(pid, process.create_time(), process.uids().real)
        except (psutil.Error, ValueError, OverflowError):
            return None

    def members(self) -> list[psutil.Process]:
        """Return the processes that there are now; none once the first has ended."""
        try:
            root = psutil.Process(self.pid)
            if root.create_time() != self.created:
                return []
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []


def used_bytes(tree: ProcessTree, device: str) -> int:
    """Return what *tree* uses of *device*; 0 when that cannot be told, so that it rather counts twice than not at all.

    Blocks for milliseconds.
    """
    if device == "cpu":
        return sum(map(_anonymous_bytes, tree.members()))
    match = _CUDA.fullmatch(device)
    if match is None:
        return 0
    by_pid = nvidia_process_bytes(int(match[1]))
    return sum(by_pid.get(process.pid, 0) for process in tree.members()) if by_pid else 0


def _anonymous_bytes(process: psutil.Process) -> int:
    """Return what a process alone has in main memory.

    Mapped files do not count: the kernel can drop them, so that the machine's figures show them as free. From statm and
    not from smaps, which makes the kernel walk all the pages of what may be a large program.
    """
    with suppress(psutil.Error):
        memory = process.memory_info()
        return max(0, int(memory.rss) - int(getattr(memory, "shared", 0)))
    return 0


def nvidia_process_bytes(number: int) -> Mapping[int, int]:
    """Return what each process uses of an NVIDIA GPU; nothing where the driver does not say, as in some containers."""
    import pynvml

    found: dict[int, int] = {}
    try:
        # Counted by the library: once it was initialized for good, this costs nothing.
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.usedGpuMemory:
                    found[int(process.pid)] = int(process.usedGpuMemory)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        log.debug("nvidia_processes_unknown", device=f"cuda{number}", error=str(error))
    return found
