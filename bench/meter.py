"""What measurements of servers share: percentiles, who used the processors, what machine it was."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

_IDLE_SHARE = 0.03
_SETTLE_STEP_S = 0.2
_SETTLE_TIMEOUT_S = 60.0


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least *share* of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def processes(pids: Iterable[int]) -> list[psutil.Process]:
    """Return the processes with all their children, leaving out those that are gone."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for member in (process, *process.children(recursive=True)):
                found[member.pid] = member
    return list(found.values())


def cpu_s(pids: Iterable[int]) -> float:
    """Return the processor time that the processes and their children have used."""
    total = 0.0
    for process in processes(pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def rss_bytes(pids: Iterable[int]) -> int:
    """Return the resident memory of the processes and their children."""
    total = 0
    for process in processes(pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


@dataclass(frozen=True, slots=True)
class Usage:
    """Who used the processors during a measurement, in cores: 1.0 is one core all the time.

    Attributes:
        server: the one that was measured.
        idle: the one that was to do nothing.
        client: this process.
        others: everything else on the machine, what its host took included.
    """

    server: float
    idle: float
    client: float
    others: float


class UsageMeter:
    """Measures from its construction to `read`."""

    def __init__(self, server: Sequence[int], idle: Sequence[int]) -> None:
        self._server, self._idle = server, idle
        self._begin = self._now()

    def _now(self) -> tuple[float, float, float, float, float]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        return time.monotonic(), cpu_s(self._server), cpu_s(self._idle), time.process_time(), busy

    def read(self) -> Usage:
        elapsed, server, idle, client, busy = (end - begin for begin, end in zip(self._begin, self._now(), strict=True))
        elapsed = max(elapsed, 1e-6)
        others = max(0.0, busy - server - idle - client)
        return Usage(*(round(seconds / elapsed, 3) for seconds in (server, idle, client, others)))


def settle(pids: Sequence[int]) -> None:
    """Wait until the processes do nothing any more: what was given up may go on for a step."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    before = cpu_s(pids)
    while time.monotonic() < deadline:
        time.sleep(_SETTLE_STEP_S)
        after = cpu_s(pids)
        if after - before < _IDLE_SHARE * _SETTLE_STEP_S:
            return
        before = after
    raise RuntimeError(f"still not idle after {_SETTLE_TIMEOUT_S:g} s")


def wait_for_quiet(limit_cores: float, patience_s: float) -> None:
    """Wait until the whole machine does next to nothing, but not for ever: what disturbs is reported anyway."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        meter = UsageMeter((), ())
        time.sleep(0.5)
        if meter.read().others < limit_cores:
            return


@contextlib.contextmanager
def burners(count: int) -> Iterator[None]:
    """Keep *count* other processes computing."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def machine() -> dict[str, object]:
    """Return what a reader must know to compare figures."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "llama_cpp_python": version("llama-cpp-python"),
        "lm": version("lmd"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
