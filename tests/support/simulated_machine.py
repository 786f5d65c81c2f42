"""A machine whose memory is really taken: devices, models of known sizes, faults; a watch on oversubscription."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from lmd.daemon.devices import Device
from lmd.daemon.errors import ModelIncompatible, RunnerCrashed, RunnerStartTimeout, TemplateFailed
from lmd.daemon.residency.facts import MeasuredMemory
from lmd.registry.digest import Digest
from lmd.registry.errors import LmdError
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.fake_runner import Script
from tests.support.in_process import FakeProcess, Host, InProcessFake
from tests.support.residents import Memory

CPU = "cpu"
GPU = "cuda0"

#: How long a driver shows the memory of a dead process as used.
LAG_S = 1.0

#: What may go wrong with a start or a load: the changed behaviour, and what those who wait for it may be told.
FAULTS: dict[str, tuple[dict[str, str], type[Exception]]] = {
    "says nothing": ({"hello": "never"}, RunnerStartTimeout),
    "exits at once": ({"hello": "exit"}, RunnerCrashed),
    "talks nonsense": ({"hello": "garbage"}, RunnerCrashed),
    "runs out of memory": ({"load": "oom"}, MemoryError),
    "is killed by the kernel": ({"load": "kill"}, MemoryError),
    "is incompatible": ({"load": "incompatible"}, ModelIncompatible),
    "has a bad template": ({"load": "template"}, TemplateFailed),
    "aborts": ({"load": "abort"}, RunnerCrashed),
    "hangs": ({"load": "hang"}, RunnerStartTimeout),
}


@dataclass(frozen=True, slots=True)
class Size:
    """What a model takes."""

    weights_bytes: int
    kv_bytes_per_1024: int

    def kv_bytes(self, num_ctx: int) -> int:
        return self.kv_bytes_per_1024 * num_ctx // 1024

    def total_bytes(self, num_ctx: int) -> int:
        return self.weights_bytes + self.kv_bytes(num_ctx)


@dataclass(slots=True)
class Chip:
    """One device: its memory, and what others use of it."""

    total_bytes: int
    other_bytes: int = 0
    present: bool = True
    #: What dead processes are still shown with, and until when.
    lagging: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a process has taken."""

    device: str
    weights_bytes: int
    kv_bytes: int
    mapped: bool

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes

    @property
    def seen_bytes(self) -> int:
        """What a reading shows: mapped weights count as cache."""
        return self.kv_bytes if self.mapped else self.total_bytes


class Sizes(Memory):
    """Stands in for the store: what no load has measured yet is known all the same, and right."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[Digest, Size] = {}

    def recall(self, kind: str, key: str) -> str | None:
        if (fact := self.facts.get((kind, key))) is not None or kind != "memory":
            return fact
        digest, *words = key.split()
        size = self.sizes[Digest.parse(digest)]
        num_ctx = int(next(word for word in words if word.startswith("ctx=")).removeprefix("ctx="))
        on_gpu = not any(word == "device=cpu" for word in words)
        measured = MeasuredMemory(
            size.weights_bytes, size.kv_bytes(num_ctx), 0, vram_bytes=size.total_bytes(num_ctx) if on_gpu else 0
        )
        return json.dumps(asdict(measured))


class SimulatedMachine(Host):
    """Runs runners that take memory. *on_fault* is told which model may fail its requests, and with what."""

    def __init__(
        self,
        chips: dict[str, Chip],
        sizes: dict[str, Size],
        *,
        chances: random.Random,
        on_fault: Callable[[str, type[Exception]], None],
    ) -> None:
        super().__init__(delay=lambda: chances.choice((0.0, 0.0, 0.001, 0.05)))
        self.chips = chips
        self.sizes = sizes
        #: What went wrong that may never go wrong.
        self.violations: list[str] = []
        #: What happens to the next processes of a model.
        self.faults: dict[str, deque[str]] = defaultdict(deque)
        self.loads: list[tuple[float, str]] = []
        self.claims: dict[int, Claim] = {}
        self._chances = chances
        self._on_fault = on_fault
        #: Processes whose memory somebody else took between the decision and the load.
        self._surprised: set[int] = set()

    def reading(self) -> list[Device]:
        """Return what the daemon can see."""
        return [
            Device(id_, "", chip.total_bytes, max(0, chip.total_bytes - self._shown_bytes(id_)))
            for id_, chip in self.chips.items()
            if chip.present
        ]

    def used_bytes(self, device: str) -> int:
        """Return what our processes and others have of a device."""
        ours = sum(claim.total_bytes for claim in self.claims.values() if claim.device == device)
        return ours + self.chips[device].other_bytes

    def others_use(self, device: str, other_bytes: int) -> None:
        """Let other programs have *other_bytes* of a device."""
        if other_bytes > self.chips[device].other_bytes:
            self._surprised |= self.alive.keys() - self.claims.keys()
        self.chips[device].other_bytes = other_bytes

    def vanish(self, device: str) -> None:
        """Take a device away; what runs on it aborts."""
        self.chips[device].present = False
        self._surprised |= self.alive.keys() - self.claims.keys()
        for pid, claim in list(self.claims.items()):
            if claim.device == device and pid in self.alive:
                self._on_fault(self.alive[pid].spec.name, RunnerCrashed)
                self.alive[pid].end(-signal.SIGABRT)

    def appear(self, device: str) -> None:
        """Bring a device back."""
        self.chips[device].present = True

    def processes_of(self, name: str) -> list[FakeProcess]:
        """Return those of a model that are not about to be gone."""
        return [process for process in self.alive.values() if process.spec.name == name and process.fate is None]

    # What processes do

    def amend(self, script: Script) -> Script:
        return replace(script, gpu=GPU in self.chips)

    def spawned(self, process: FakeProcess) -> None:
        """Let the next fault of its model happen to a new process."""
        self._spoil(process, "hello")

    def _spoil(self, process: FakeProcess, part: str) -> None:
        pending = self.faults[process.spec.name]
        if pending and part in FAULTS[pending[0]][0]:
            changes, error = FAULTS[pending.popleft()]
            process.fake.script = replace(process.fake.script, **changes)  # type: ignore[arg-type]
            self._on_fault(process.spec.name, error)

    async def before_load(self, fake: InProcessFake) -> None:
        process, name = fake.process, fake.process.spec.name
        self.loads.append((asyncio.get_running_loop().time(), name))
        if any(
            other.pid in self.claims for other in self.processes_of(name) if other.spec.weights == process.spec.weights
        ):
            self.violations.append(f"{name} is loaded twice")
        size = self.sizes[name]
        device = GPU if fake.on_gpu and self.chips[GPU].present else CPU
        claim = Claim(
            device, size.weights_bytes, size.kv_bytes(fake.load.num_ctx), fake.load.use_mmap and device == CPU
        )
        if self.used_bytes(device) + claim.total_bytes > self.chips[device].total_bytes:
            if process.pid not in self._surprised:
                self.violations.append(f"{name} was loaded where it does not fit: {device}, {claim}, {self.claims}")
            fake.script = replace(fake.script, load="oom")
        else:
            self.claims[process.pid] = claim
            await asyncio.sleep(self._chances.choice((0.0, 0.2, 3.0)))
        self._spoil(process, "load")

    def amend_ready(self, fake: InProcessFake, ready: frames.Ready) -> frames.Ready:
        claim = self.claims[fake.pid]
        ready.weights_bytes, ready.kv_bytes = claim.weights_bytes, claim.kv_bytes
        ready.vram_bytes = claim.total_bytes if claim.device == GPU else 0
        ready.gpu_layers = 99 if claim.device == GPU else 0
        return ready

    def ended(self, process: FakeProcess) -> None:
        claim = self.claims.pop(process.pid, None)
        if claim is not None and claim.device != CPU:
            until = asyncio.get_running_loop().time() + LAG_S
            self.chips[claim.device].lagging.append((until, claim.total_bytes))

    def _shown_bytes(self, device: str) -> int:
        now, chip = asyncio.get_running_loop().time(), self.chips[device]
        chip.lagging = [(until, size_bytes) for until, size_bytes in chip.lagging if until > now]
        ours = sum(claim.seen_bytes for claim in self.claims.values() if claim.device == device)
        return ours + chip.other_bytes + sum(size_bytes for _, size_bytes in chip.lagging)


def is_domain_error(error: BaseException) -> bool:
    """Tell whether an error says something to the one who gets it."""
    return isinstance(error, LmdError) and bool(error.message)
