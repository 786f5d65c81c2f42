"""A machine with a residency on it whose runners are fakes; for tests of what stands above them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, cast

import psutil

from lmd.daemon.adapter_scales import AdapterFile
from lmd.daemon.config import Config
from lmd.daemon.devices import Device
from lmd.daemon.errors import HandedBack
from lmd.daemon.residency.facts import MeasuredMemory
from lmd.daemon.residency.offload import DeviceSource
from lmd.daemon.residency.residency import Residency
from lmd.daemon.residency.ticket import Ticket
from lmd.daemon.residency.values import Limits, LoadSettings, RunnerState, RunnerStatus
from lmd.daemon.runner_answer import Answer
from lmd.daemon.runner_process import RunnerProcess
from lmd.daemon.runner_spec import RunnerTimings
from lmd.daemon.saved_kv import SavedKv
from lmd.registry.digest import Digest
from lmd.registry.errors import ModelNotFound
from lmd.registry.gguf import GgufHeader, read_header
from lmd.registry.lm_config import Message
from lmd.registry.parameters import ParameterValue
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.fake_runner import FAKE_COMMAND, Script, write_model
from tests.support.gguf_bytes import TinyModel
from tests.support.in_process import Host
from tests.support.leaks import until

P = ParamSpec("P")
T = TypeVar("T")

SETTINGS = LoadSettings(num_ctx=1024)
QUICK = RunnerTimings(hello_s=30, load_stall_s=30, ping_interval_s=0.05, hang_s=20, term_s=0.3)
LIMITS = Limits(max_queue=100, slots=2, wait_s=20, drain_s=20, backoff_s=0.05, failed_s=20)


class Threads:
    """Stands in for the daemon's pool of threads."""

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(fn, *args, **kwargs)


class Memory:
    """Stands in for the store's memory of measured facts; a model not yet measured is said to need *unknown_bytes*."""

    def __init__(self) -> None:
        self.facts: dict[tuple[str, str], str] = {}
        self.unknown_bytes = 1000
        #: Whether a model that was never loaded has a need all the same; otherwise it is estimated.
        self.measured = True
        self._needs: dict[str, int] = {}

    def needs(self, settings: str, needed_bytes: int) -> None:
        """Say that loads with *settings*, a word of the facts' keys such as "ctx=4096", need so many bytes."""
        self._needs[settings] = needed_bytes

    def recall(self, kind: str, key: str) -> str | None:
        if not self.measured:
            return self.facts.get((kind, key))
        words = key.split()
        needed_bytes = next((self._needs[word] for word in words if word in self._needs), self.unknown_bytes)
        unknown = MeasuredMemory(needed_bytes, 0, 0, vram_bytes=needed_bytes)
        return self.facts.get((kind, key), json.dumps(asdict(unknown)) if kind == "memory" else None)

    def remember(self, kind: str, key: str, value: str) -> None:
        self.facts[kind, key] = value


def header(context_length: int = 4096) -> GgufHeader:
    """The header of a small model with such a context."""
    data = TinyModel(extra={"llama.context_length": context_length, "llama.block_count": 2}).to_bytes()
    return read_header(io.BytesIO(data), len(data))


@dataclass(frozen=True)
class Model:
    """A resolved model whose weights are a script for the fake runner."""

    name: str
    weights: tuple[Path, ...]
    template: str | None = None
    header: GgufHeader = field(default_factory=header)
    system: str | None = None
    messages: tuple[Message, ...] = ()
    capabilities: tuple[str, ...] = ("completion",)
    digest: Digest | None = None
    draft: tuple[Path, ...] = ()
    draft_header: GgufHeader | None = None
    adapters: tuple[AdapterFile, ...] = ()
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)

    @property
    def manifest_digest(self) -> Digest:
        return self.digest or Digest.of(self.name.encode())


@dataclass
class World:
    """A machine with a residency on it."""

    path: Path
    memory: Memory = field(default_factory=Memory)
    free_bytes: int = 1 << 30
    gpu_free_bytes: int | None = None
    keep_alive: timedelta = timedelta(minutes=5)
    limits: Limits = LIMITS
    timings: RunnerTimings = QUICK
    require_gpu: bool = False
    #: What tells the devices, instead of the figures above.
    device_source: DeviceSource | None = None
    released: list[Digest] = field(default_factory=list)
    saved_kv: SavedKv | None = None
    #: Where runners are without processes; None for processes.
    host: Host | None = None
    spare_runner: bool = False
    _residency: Residency | None = None

    @property
    def config(self) -> Config:
        runtime = SimpleNamespace(
            keep_alive=self.keep_alive,
            load_timeout=timedelta(seconds=30),
            drain_timeout=timedelta(seconds=30),
            slots=2,
            num_ctx=4096,
            min_ctx=4096,
            kv_type="f16",
            max_queue=100,
            memory_reserve_bytes=0,
            kv_ram_bytes=0,
            require_gpu=self.require_gpu,
            preload=(),
            spare_runner=self.spare_runner,
            caller_weights={"uid:2": 2.5},
        )
        return cast(Config, SimpleNamespace(runtime=runtime, dirs=SimpleNamespace(runtime=self.path / "run")))

    @property
    def residency(self) -> Residency:
        """The residency, made at first use so that a test can change the fields above before."""
        if self._residency is None:
            self._residency = Residency(
                self.config,
                self.memory,
                self.path / "log",
                Threads(),
                saved_kv=self.saved_kv,
                read_devices=self.devices,
                device_source=self.device_source,
                command=FAKE_COMMAND,
                timings=self.timings,
                limits=self.limits,
                start_runner=self.host.start if self.host is not None else RunnerProcess.start,
            )
            self._residency.on_released = self.released.append
        return self._residency

    def devices(self) -> list[Device]:
        """Return what can be loaded on; a reading never shows what fakes "hold", as with mapped weights."""
        found = [Device("cpu", "", 1 << 31, self.free_bytes)]
        if self.gpu_free_bytes is not None:
            found.append(Device("cuda0", "", 1 << 31, self.gpu_free_bytes))
        return found

    async def close(self) -> None:
        """End everything; no runner may be left."""
        async with asyncio.timeout(30):
            for status in self.residency.list():
                if status.state is not RunnerState.FAILED:
                    with contextlib.suppress(ModelNotFound):  # it was about to go by itself
                        await self.residency.unload(str(status.digest), force=True)
            await self.residency.stop()
        assert self.residency.resident_manifests() == set()

    def model(self, name: str, **script: Any) -> Model:
        return Model(f"{name}:latest", (write_model(self.path / name, Script(**script)),))

    def loads(self) -> list[str]:
        journal = self.path / "journal"
        return journal.read_text().splitlines() if journal.exists() else []

    def journal(self) -> str:
        return str(self.path / "journal")

    def status(self, model: Model) -> RunnerStatus | None:
        found = [s for s in self.residency.list() if s.digest == model.manifest_digest]
        return found[0] if found else None

    def state(self, model: Model) -> RunnerState | None:
        status = self.status(model)
        return status.state if status is not None else None

    def signal(self, model: Model, number: int) -> None:
        """Send a signal to the model's runner."""
        status = self.status(model)
        assert status is not None
        if self.host is not None:
            self.host.alive[status.pid].send_signal(number)
        else:
            psutil.Process(status.pid).send_signal(number)

    def unlisted(self) -> set[int]:
        """The processes of runners that are not ready yet."""
        alive = self.host.alive if self.host is not None else [child.pid for child in psutil.Process().children()]
        return set(alive) - {status.pid for status in self.residency.list()}

    def kill(self, pid: int) -> None:
        """End a runner at once."""
        if self.host is not None:
            self.host.alive[pid].send_signal(signal.SIGKILL)
        else:
            psutil.Process(pid).kill()

    def is_alive(self, pid: int) -> bool:
        """Whether a runner is there."""
        return pid in self.host.alive if self.host is not None else psutil.pid_exists(pid)

    async def ask(
        self,
        model: Model,
        prompt: str,
        settings: LoadSettings = SETTINGS,
        keep_alive: timedelta | None = None,
        caller: str = "",
    ) -> str:
        """Do what a request does, asking again when it is handed back; return the text."""
        again = False
        while True:
            with self.residency.enqueue(model, settings, keep_alive, caller=caller, again=again) as ticket:
                answer = await self.submit(ticket, prompt, caller)
                try:
                    return await collect(answer)
                except HandedBack:
                    again = True
                finally:
                    answer.close()

    async def submit(self, ticket: Ticket, prompt: str, caller: str = "") -> Answer:
        assert await ticket.wait(30)
        return await ticket.runner.submit(frames.Submit(prompt=prompt, caller=caller))

    async def holding(self, model: Model, prompt: str = "hold", **options: Any) -> asyncio.Task[str]:
        """Start a request that goes on, and return when it has a slot."""
        before = status.slots_busy if (status := self.status(model)) else 0
        task = asyncio.create_task(self.ask(model, prompt, **options))
        await until(lambda: task.done() or ((s := self.status(model)) is not None and s.slots_busy > before))
        assert not task.done()
        return task


async def collect(answer: Answer) -> str:
    pieces = []
    async with asyncio.timeout(30):
        while True:
            await answer.changed()
            pieces += [delta.text for delta in answer.take()]
            if answer.error is not None:
                raise answer.error
            if answer.finished is not None:
                return "".join(pieces)
