"""What a process and its children use of a device's memory.

For programs that are not ours: the machine's figures show what they took, and a lease must not count it again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog

from lmd.daemon.errors import PermissionDenied
from lmd.registry.errors import InvalidRequest

log = structlog.get_logger(__name__)

#: Of a client of the kernel's graphics drivers, the memory of the card that it has: amdgpu's, xe's and i915's words.
_CARD_MEMORY = re.compile(r"drm-(?P<kind>resident|memory)-(?:vram|local)\d*:\s*(?P<number>\d+)\s*(?P<unit>[KM]iB)?")
_UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20}


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

    @classmethod
    def owned(cls, pid: int, uid: int) -> ProcessTree:
        """Return the tree of a process of this user, or of anybody's for root.

        Raises:
            InvalidRequest: there is no such process.
            PermissionDenied: it is another user's: what a lease leaves free would tell what that takes.
        """
        tree = cls.of(pid)
        if tree is None:
            hint = "leave it out to count no process"
            raise InvalidRequest(f"there is no process {pid} that the daemon can see", field="pid", hint=hint)
        if uid not in (0, tree.uid):
            raise PermissionDenied(f"process {pid} belongs to another user", action="lease")
        return tree

    def members(self) -> list[psutil.Process]:
        """Return the processes that there are now; none once the first has ended."""
        try:
            root = psutil.Process(self.pid)
            if root.create_time() != self.created:
                return []
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []


def used_bytes(tree: ProcessTree, device: str, bus_id: str = "") -> int:
    """Return what *tree* uses of *device*, which is at the PCI address *bus_id* when it is a card.

    0 when that cannot be told, so that it rather counts twice than not at all. Blocks for milliseconds.
    """
    members = tree.members()
    if device == "cpu":
        return sum(map(_anonymous_bytes, members))
    if not bus_id or not members:
        return 0
    pids = [process.pid for process in members]
    by_driver = nvidia_process_bytes(bus_id)
    return sum(by_driver.get(pid, 0) for pid in pids) or drm_process_bytes(pids, bus_id)


def _anonymous_bytes(process: psutil.Process) -> int:
    """Return what a process alone has in main memory.

    Mapped files do not count: the kernel can drop them, so that the machine's figures show them as free. From statm and
    not from smaps, which makes the kernel walk all the pages of what may be a large program.
    """
    with suppress(psutil.Error):
        memory = process.memory_info()
        return max(0, int(memory.rss) - int(getattr(memory, "shared", 0)))
    return 0


def nvidia_process_bytes(bus_id: str) -> Mapping[int, int]:
    """Return what each process uses of an NVIDIA GPU; nothing where the driver does not say, as in some containers."""
    import pynvml

    found: dict[int, int] = {}
    try:
        # Counted by the library: where it is in use already, this costs nothing.
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
            for process in (
                *pynvml.nvmlDeviceGetComputeRunningProcesses(handle),
                *pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
            ):
                # One that computes and draws is in both lists, with the same number.
                found[int(process.pid)] = int(process.usedGpuMemory or 0)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        log.debug("nvidia_processes_unknown", bus_id=bus_id, error=str(error))
    return found


def drm_process_bytes(pids: Iterable[int], bus_id: str, proc: Path = Path("/proc")) -> int:
    """Return what processes use of a card with one of the kernel's own drivers.

    Source: Linux Documentation/gpu/drm-usage-stats.rst. A client that several processes share counts once.
    """
    clients: dict[str, int] = {}
    for pid in pids:
        # Files of other users cannot be read, and processes end while they are looked at.
        with suppress(OSError):
            for entry in os.listdir(proc / str(pid) / "fdinfo"):
                with suppress(OSError):
                    text = (proc / str(pid) / "fdinfo" / entry).read_text(errors="replace")
                    if "drm-client-id:" in text:
                        _note_client(clients, text, bus_id)
    return sum(clients.values())


def _note_client(clients: dict[str, int], text: str, bus_id: str) -> None:
    facts = {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    if facts.get("drm-pdev", "").lower() != bus_id:
        return
    sizes: dict[str, int] = {}
    for found in _CARD_MEMORY.finditer(text):
        size = int(found["number"]) * _UNITS[found["unit"]]
        sizes[found["kind"]] = sizes.get(found["kind"], 0) + size
    # amdgpu says it twice, in its own old word and in the common one.
    clients[facts["drm-client-id"]] = sizes.get("resident", sizes.get("memory", 0))
