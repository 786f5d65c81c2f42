"""A machine whose memory is really taken: devices, models of known sizes, faults; a watch on oversubscription."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lmd.daemon.devices import Device
from lmd.daemon.errors import ModelIncompatible, RunnerCrashed, RunnerStartTimeout, TemplateFailed
from lmd.registry.memory import LayerMemory, MemoryEstimate
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.fake_runner import Script
from tests.support.in_process import FakeProcess, Host, InProcessFake

CPU = "cpu"
GPUS = ("cuda0", "cuda1")

#: What sizes are told in; a spare runner takes no note of less.
UNIT = 8 << 20
#: Each model has so many layers beside input and output.
LAYERS = 4

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
    """What a model takes, in units of memory; the rest of its parts follow from that."""

    weights: int
    kv_per_1024: int

    def estimate(self, num_ctx: int) -> MemoryEstimate:
        """Return what the daemon finds in its header."""
        layer = LayerMemory(self.weights * UNIT // 6, self.kv_per_1024 * num_ctx // 1024 * UNIT // LAYERS)
        return MemoryEstimate(
            weights_bytes=6 * layer.weights_bytes,
            kv_bytes=LAYERS * layer.kv_bytes,
            compute_bytes=UNIT,
            layers=(layer,) * LAYERS,
            input_bytes=layer.weights_bytes,
            output_bytes=layer.weights_bytes,
        )

    def taken(self, load: frames.Load) -> list[frames.DeviceBytes]:
        """Return what a runner takes that is told to load it so."""
        whole = self.estimate(load.num_ctx)
        parts = [(layer.weights_bytes, layer.kv_bytes) for layer in whole.layers] + [(whole.output_bytes, 0)]
        on_gpus = sum(round(part.part) for part in load.devices) if load.num_gpu else 0
        place = len(parts) - on_gpus
        rest = parts[:place]
        taken = [
            frames.DeviceBytes(
                device=CPU,
                weights_bytes=whole.input_bytes + sum(weights for weights, _ in rest),
                kv_bytes=sum(kv for _, kv in rest),
                compute_bytes=whole.compute_bytes if rest else 0,
            )
        ]
        for part in load.devices if on_gpus else ():
            here = parts[place : place + round(part.part)]
            place += len(here)
            taken.append(
                frames.DeviceBytes(
                    device=part.device,
                    weights_bytes=sum(weights for weights, _ in here),
                    kv_bytes=sum(kv for _, kv in here),
                    compute_bytes=whole.compute_bytes,
                )
            )
        return taken


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
    """What a process has taken of a device, and what of that a reading shows: mapped weights count as cache."""

    device: str
    total_bytes: int
    seen_bytes: int


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
        self.claims: dict[int, list[Claim]] = {}
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

    def free_bytes(self, device: str) -> int:
        """Return what neither our processes nor others have of a device, seen or not."""
        ours = sum(claim.total_bytes for claims in self.claims.values() for claim in claims if claim.device == device)
        return self.chips[device].total_bytes - ours - self.chips[device].other_bytes

    def others_use(self, device: str, other_bytes: int) -> None:
        """Let other programs have *other_bytes* of a device."""
        if other_bytes > self.chips[device].other_bytes:
            self._surprised |= self.alive.keys() - self.claims.keys()
        self.chips[device].other_bytes = other_bytes

    def vanish(self, device: str) -> None:
        """Take a device away; what runs on it aborts."""
        self.chips[device].present = False
        self._surprised |= self.alive.keys() - self.claims.keys()
        for pid, claims in list(self.claims.items()):
            if any(claim.device == device for claim in claims):
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
        return replace(script, gpu=len(self.chips) > 1)

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
        claims = [self._claim(fake.load, taken) for taken in self.sizes[name].taken(fake.load)]
        if not all(self.chips[claim.device].present for claim in claims):
            self._on_fault(name, RunnerCrashed)
            fake.die(signal.SIGABRT)
        if short := [claim for claim in claims if claim.total_bytes > self.free_bytes(claim.device)]:
            if process.pid not in self._surprised:
                self.violations.append(f"{name} was loaded where it does not fit: {short}, {self.claims}")
            self._on_fault(name, MemoryError)
            fake.script = replace(fake.script, load="oom")
            return
        self.claims[process.pid] = claims
        await asyncio.sleep(self._chances.choice((0.0, 0.2, 3.0)))
        self._spoil(process, "load")

    def amend_ready(self, fake: InProcessFake, ready: frames.Ready) -> frames.Ready:
        taken = self.sizes[fake.process.spec.name].taken(fake.load)
        ready.device_bytes.extend(taken)
        ready.weights_bytes = sum(part.weights_bytes for part in taken)
        ready.kv_bytes = sum(part.kv_bytes for part in taken)
        ready.compute_bytes = sum(part.compute_bytes for part in taken)
        ready.vram_bytes = sum(
            part.weights_bytes + part.kv_bytes + part.compute_bytes for part in taken if part.device != CPU
        )
        ready.mapped_bytes = taken[0].weights_bytes if fake.load.use_mmap else 0
        ready.gpu_layers = sum(round(part.part) for part in fake.load.devices)
        return ready

    def ended(self, process: FakeProcess) -> None:
        for claim in self.claims.pop(process.pid, ()):
            if claim.device != CPU:
                until = asyncio.get_running_loop().time() + LAG_S
                self.chips[claim.device].lagging.append((until, claim.total_bytes))

    def _claim(self, load: frames.Load, taken: frames.DeviceBytes) -> Claim:
        unmapped_bytes = taken.kv_bytes + taken.compute_bytes
        total_bytes = taken.weights_bytes + unmapped_bytes
        mapped = taken.device == CPU and load.use_mmap
        return Claim(taken.device, total_bytes, unmapped_bytes if mapped else total_bytes)

    def _shown_bytes(self, device: str) -> int:
        now, chip = asyncio.get_running_loop().time(), self.chips[device]
        chip.lagging = [(until, size_bytes) for until, size_bytes in chip.lagging if until > now]
        ours = sum(claim.seen_bytes for claims in self.claims.values() for claim in claims if claim.device == device)
        return ours + chip.other_bytes + sum(size_bytes for _, size_bytes in chip.lagging)
