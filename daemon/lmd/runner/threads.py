"""How many threads the engine gets on this machine, for this model: measured, not guessed."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmd.runner.batch import Batch
from lmd.runner.memory import Memory

_BUDGET_S = 1.0
_DECODE_ROUNDS = 5
_PREFILL_ROUNDS = 2
_PREFILL_TOKENS = 64
# A model whose weights fit in a core's cache gains nothing from a second one, and is not worth measuring.
_TINY_WEIGHTS_BYTES = 16 << 20
# Fewer threads are taken when they are faster by this. A disturbed measurement must not cost every later answer: with
# a bias towards few, one busy core during the load halved the speed of a model from then on (measured).
_WORTH = 0.8

# A measurement during which others had more than this of one core says what is best beside them, not what is best.
_QUIET_CORES = 0.1

_STAT = Path("/proc/stat")
_CPUS = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Threads:
    """Thread counts for a step of one token a sequence and for a chunk of prompt.

    *lasting* says that they hold for later loads as well: nothing else disturbed the measurement.
    """

    decode: int
    prefill: int
    lasting: bool = True


def usable_cores() -> int:
    """Return how many physical cores this process may use: affinity, hyper-threads and the container's quota count."""
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    count = len(cores)
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return count
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        count = min(count, int(quota) // int(period))
    return max(1, count)


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}" / "topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def measure_threads(
    llama: Any, context: Any, memory: Memory, batch: Batch, *, cores: int, weights_bytes: int, token: int
) -> Threads:
    """Return the best thread counts, found within about a second.

    Leaves the memory empty. Weights that are still on disk are read by the first, unmeasured round.
    """
    if cores == 1 or weights_bytes < _TINY_WEIGHTS_BYTES:
        return Threads(1, 1)
    others = _Others()
    deadline = time.monotonic() + _BUDGET_S
    chunk = array("i", [token] * min(_PREFILL_TOKENS, batch.capacity))
    single = array("i", [token])

    def seconds(tokens: array[int], threads: int, rounds: int) -> float:
        llama.llama_set_n_threads(context, threads, threads)
        best = float("inf")
        for _ in range(rounds):
            memory.clear_all()
            batch.clear()
            batch.add_chunk(tokens, 0, 0, sample=True)
            start = time.monotonic()
            llama.llama_decode(context, batch.finish())
            llama.llama_synchronize(context)
            best = min(best, time.monotonic() - start)
            if time.monotonic() > deadline:
                break
        return best

    seconds(single, cores, 1)
    decode, prefill = cores, cores
    # From many to few: with a slow model only the first are measured, and many is the better guess.
    for count in _candidates(cores):
        if time.monotonic() > deadline:
            break
        if _is_faster(lambda threads: seconds(single, threads, 1), count, decode, _DECODE_ROUNDS):
            decode = count
        if time.monotonic() > deadline:
            break
        if _is_faster(lambda threads: seconds(chunk, threads, 1), count, prefill, _PREFILL_ROUNDS):
            prefill = count
    memory.clear_all()
    return Threads(decode, prefill, lasting=others.cores() <= _QUIET_CORES)


class _Others:
    """Watches what the rest of the machine computes."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy_s = self._busy()

    def cores(self) -> float:
        """Return how many cores others had since then, in the mean; 0 where the system does not tell."""
        elapsed_s = time.monotonic() - self._began
        return max(0.0, self._busy() - self._busy_s) / elapsed_s if elapsed_s > 0 else 0.0

    def _busy(self) -> float:
        """Return the seconds of processor time of all but this process; for proc(5) see "cpu" in /proc/stat."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split(maxsplit=9)[1:9])
        except (OSError, ValueError):
            return 0.0
        own = os.times()
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _is_faster(seconds: Callable[[int], float], count: int, best: int, rounds: int) -> bool:
    """Compare two counts in turns, so that what else the machine does hits both, by the best round of each."""
    times = [(seconds(count), seconds(best)) for _ in range(rounds)]
    return min(time_s for time_s, _ in times) < _WORTH * min(time_s for _, time_s in times)


def _candidates(cores: int) -> list[int]:
    """Return fewer threads to try, most first: half, a quarter … one, and one less than all."""
    counts = {cores - 1}
    count = cores // 2
    while count:
        counts.add(count)
        count //= 2
    return sorted(counts - {0, cores}, reverse=True)
