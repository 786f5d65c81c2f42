"""Residency against a machine with memory and faults: any order of requests, kills, evictions and time.

Runners are tasks on a loop with a virtual clock, so that hours take a second. What must never be, whatever happens:

- a request without an end, with two, or with an error that nothing explains;
- two runners of one model;
- a model unloaded or evicted under an answer, unless somebody forced it;
- more memory promised than there is;
- anything left when everybody has gone.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmd.daemon.devices import Device
from lmd.daemon.errors import DeviceUnavailable, RunnerCrashed, RunnerHung, RunnerStartTimeout, Unloaded
from lmd.daemon.residency.residency import Residency
from lmd.daemon.residency.values import FOR_EVER, Limits, LoadSettings, RunnerState, RunnerStatus
from lmd.daemon.runner_spec import RunnerTimings
from lmd.registry.digest import Digest
from lmd.registry.errors import LmdError, ModelNotFound
from tests.support.fake_runner import write_model
from tests.support.residents import Memory, Model, World
from tests.support.simulated_machine import CPU, FAULTS, GPUS, UNIT, Chip, SimulatedMachine, Size
from tests.support.told_requests import Judge, Request, Requests
from tests.support.virtual_loop import VirtualLoop

SIZES = {"a:latest": Size(30, 10), "b:latest": Size(40, 5), "c:latest": Size(60, 10), "d:latest": Size(20, 20)}
LIMITS = Limits(max_queue=8, slots=2, wait_s=120, drain_s=30)
TIMINGS = RunnerTimings(ping_interval_s=15)

names = st.sampled_from(sorted(SIZES))
callers = st.sampled_from(["uid:1", "uid:2", "uid:3"])
contexts = st.sampled_from([1024, 1024, 2048, 4096])
wishes = st.builds(LoadSettings, num_ctx=contexts, num_gpu=st.sampled_from([-1, -1, -1, 0, 99]))
keep_alives = st.sampled_from([None, None, timedelta(0), timedelta(seconds=20), timedelta(hours=1)])
picks = st.integers(0, 1 << 16)


class SimulatedWorld(World):
    """A residency on the simulated machine."""

    def devices(self) -> list[Device]:
        assert isinstance(self.host, SimulatedMachine)
        return self.host.reading()


class ResidencyMachine(RuleBasedStateMachine):
    """Does things to a residency, and knows what each request may be told."""

    @initialize(
        main=st.sampled_from([120, 160, 400]),
        gpus=st.sampled_from([(), (), (80,), (120,), (60, 60)]),
        spare=st.booleans(),
        seed=st.integers(0, 1 << 32),
    )
    def begin(self, main: int, gpus: tuple[int, ...], spare: bool, seed: int) -> None:
        fast = Path("/dev/shm")  # Syncing is not what is tested here.
        self.directory = Path(tempfile.mkdtemp(dir=fast if fast.is_dir() else None))
        self.loop = VirtualLoop()
        self.loop.set_exception_handler(self.note_loop_failure)
        self.failures: list[str] = []
        self.logged = structlog.testing.LogCapture()
        self.configured = structlog.get_config()["processors"]
        structlog.configure(processors=[self.logged])
        chips = {CPU: Chip(main * UNIT)} | {id_: Chip(gpu * UNIT) for id_, gpu in zip(GPUS, gpus, strict=False)}
        self.machine = SimulatedMachine(chips, SIZES, chances=random.Random(seed), on_fault=self.note_fault)
        memory = Memory()
        memory.measured = False
        self.world = SimulatedWorld(
            self.directory, memory=memory, host=self.machine, limits=LIMITS, timings=TIMINGS, spare_runner=spare
        )
        self.models = {name: self.world.model(name.removesuffix(":latest")) for name in SIZES}
        sizes = {id(model.header): SIZES[name] for name, model in self.models.items()}
        self.estimates = patch(
            "lmd.daemon.residency.loading.estimate",
            lambda header, *, num_ctx, **_: sizes[id(header)].estimate(num_ctx),
        )
        self.estimates.start()
        self.residency: Residency = self.within(lambda: self.world.residency)
        self.requests = Requests(self.residency, self.loop, wait_s=LIMITS.wait_s, max_queue=LIMITS.max_queue)
        self.versions = 0
        self.moved: list[str] = []
        self.gates: list[tuple[Request, Path]] = []
        self.short = Shortness(self)

    def within(self, make: Any) -> Any:
        """Call *make* on the loop."""

        async def call() -> Any:
            return make()

        return self.loop.run_until_complete(call())

    def note_loop_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(f"{context['message']}: {context.get('exception')!r}")

    def note_fault(self, name: str, error: type[Exception]) -> None:
        self.requests.note_fault(name, error)

    # What clients do

    @rule(name=names, wish=wishes, keep_alive=keep_alives, caller=callers, batch=st.booleans())
    def ask(self, name: str, wish: LoadSettings, keep_alive: timedelta | None, caller: str, batch: bool) -> None:
        self.requests.ask(self.models[name], wish, keep_alive=keep_alive, caller=caller, batch=batch)
        self.loop.settle()

    @rule(name=names, wish=wishes, caller=callers, batch=st.booleans())
    def ask_for_something_long(self, name: str, wish: LoadSettings, caller: str, batch: bool) -> None:
        gate = self.directory / f"gate-{len(self.gates)}-{self.loop.time()}"
        request = self.requests.ask(
            self.models[name], wish, caller=caller, prompt=f"gate {gate}", expected="x", batch=batch
        )
        self.gates.append((request, gate))
        self.loop.settle()

    @rule(name=names)
    def ask_to_keep_for_ever(self, name: str) -> None:
        self.requests.ask(self.models[name], LoadSettings(1024), keep_alive=FOR_EVER)
        self.short.kept.add(name)
        self.loop.settle()

    @rule(asked=st.lists(st.tuples(names, wishes), min_size=2, max_size=4), caller=callers)
    def ask_at_once(self, asked: list[tuple[str, LoadSettings]], caller: str) -> None:
        for name, wish in asked:
            self.requests.ask(self.models[name], wish, caller=caller)
        self.loop.settle()

    @precondition(lambda self: self.gates)
    @rule(pick=picks)
    def finish_something_long(self, pick: int) -> None:
        _, gate = self.gates.pop(pick % len(self.gates))
        gate.touch()
        self.loop.advance(0.1)

    @precondition(lambda self: self.requests.open())
    @rule(pick=picks)
    def hang_up(self, pick: int) -> None:
        waiting = self.requests.open()
        request = waiting[pick % len(waiting)]
        request.cancelled = True
        request.task.cancel()
        self.loop.settle()

    # What people do

    @rule(name=names, force=st.booleans())
    def unload(self, name: str, force: bool) -> None:
        if force:
            self.note_fault(name, Unloaded)
        self.loop.create_task(self.stop(name, force))
        self.loop.settle()

    async def stop(self, name: str, force: bool) -> None:
        try:
            await self.residency.unload(name, force=force)
        except ModelNotFound:
            return

    @rule(name=names, wish=st.sampled_from([1024, 4096]))
    def load(self, name: str, wish: int) -> None:
        self.requests.explicit_loads[name] += 1
        self.loop.create_task(self.make_resident(self.models[name], wish))
        self.loop.settle()

    async def make_resident(self, model: Model, num_ctx: int) -> None:
        try:
            async for _ in self.residency.load(model, {"num_ctx": num_ctx}):
                pass
        except LmdError:
            return

    @rule(name=names, num_ctx=st.sampled_from([1024, 2048]))
    def pin(self, name: str, num_ctx: int) -> None:
        model = self.models[name]
        self.within(lambda: self.residency.pin(model, {"num_ctx": num_ctx}))
        self.short.kept.add(name)
        self.loop.settle()

    @rule(name=names)
    def unpin(self, name: str) -> None:
        self.within(lambda: self.residency.unpin(name))
        self.loop.settle()

    @rule(name=names)
    def make_a_new_version(self, name: str) -> None:
        """Whoever asks for the name from now on gets another model; the old one goes after its answers."""
        self.versions += 1
        self.moved.append(name)
        weights = write_model(self.directory / f"version-{self.versions}")
        old = self.models[name]
        self.models[name] = replace(old, weights=(weights,), digest=Digest.of(weights.name.encode()))

    @precondition(lambda self: not self.requests.draining)
    @rule(sure=st.integers(0, 9))
    def tell_the_daemon_to_stop(self, sure: int) -> None:
        if sure == 0:
            self.requests.draining = True
            self.within(self.residency.drain)
            self.loop.settle()

    # What happens to machines

    @rule(name=names, number=st.sampled_from([signal.SIGKILL, signal.SIGABRT]))
    def kill(self, name: str, number: signal.Signals) -> None:
        for process in self.machine.processes_of(name):
            self.note_fault(name, RunnerCrashed)
            if number == signal.SIGKILL:
                self.note_fault(name, MemoryError)
            self.within(lambda process=process: process.send_signal(number))
        self.loop.settle()

    @rule(name=names)
    def freeze(self, name: str) -> None:
        for process in self.machine.processes_of(name):
            self.note_hang(name)
            self.within(lambda process=process: process.send_signal(signal.SIGSTOP))
        self.loop.settle()

    def note_hang(self, name: str) -> None:
        """A runner that hangs is found out at its start, its load, or by its silence."""
        self.note_fault(name, RunnerHung)
        self.note_fault(name, RunnerStartTimeout)

    @rule(name=names)
    def thaw(self, name: str) -> None:
        for process in self.machine.processes_of(name):
            self.within(lambda process=process: process.send_signal(signal.SIGCONT))
        self.loop.settle()

    @rule(name=names, fault=st.sampled_from(sorted(FAULTS)))
    def spoil_the_next_start(self, name: str, fault: str) -> None:
        self.machine.faults[name].append(fault)

    @rule(device=st.sampled_from([CPU, *GPUS]), part=st.sampled_from([0, 30, 60, 90]))
    def others_take_memory(self, device: str, part: int) -> None:
        if device in self.machine.chips:
            self.machine.others_use(device, self.machine.chips[device].total_bytes * part // 100)
            self.short.note_others()
            self.loop.settle()

    @precondition(lambda self: len(self.machine.chips) > 1)
    @rule()
    def lose_a_gpu(self) -> None:
        self.within(lambda: self.machine.vanish(GPUS[0]))
        self.short.gpu_was_lost = True
        for name in SIZES:
            self.note_fault(name, DeviceUnavailable)
        self.loop.settle()

    @precondition(lambda self: len(self.machine.chips) > 1)
    @rule()
    def find_the_gpu_again(self) -> None:
        self.machine.appear(GPUS[0])
        self.loop.settle()

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0, 1.0, 5.0, 5.0, 20.0, 61.0, 301.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.loop.advance(seconds)

    # What must be true

    @invariant()
    def nothing_is_wrong(self) -> None:
        if not hasattr(self, "requests"):
            return
        wrong = self.machine.violations + self.requests.judge(self.short)
        assert not wrong, wrong
        self.check_failures()
        for status in self.within(self.residency.list):
            self.check_status(status)

    def check_failures(self) -> None:
        assert self.failures == []
        broken = [entry for entry in self.logged.entries if entry["log_level"] in ("error", "critical")]
        assert broken == []
        self.logged.entries.clear()

    def check_status(self, status: RunnerStatus) -> None:
        assert 0 <= status.slots_busy <= status.slots
        assert status.queued >= 0
        assert (status.pid == 0) == (status.state in (RunnerState.LOADING, RunnerState.FAILED)) or not status.pid
        if status.state is RunnerState.FAILED:
            assert status.reason

    def teardown(self) -> None:
        if not hasattr(self, "requests"):
            return
        try:
            self.end()
        finally:
            structlog.configure(processors=self.configured)
            self.estimates.stop()
            self.loop.dissolve()
            shutil.rmtree(self.directory)

    def end(self) -> None:
        """Everybody gets an answer or a reason; then everything goes."""
        for _, gate in self.gates:
            gate.touch()
        for device in self.machine.chips:
            self.machine.appear(device)
            self.machine.others_use(device, 0)
        # A frozen runner is found out, its successor waits for a pause and may wait for memory.
        for _ in range(6):
            self.loop.advance(LIMITS.wait_s)
            self.nothing_is_wrong()
        left = self.requests.open()
        assert not left, [(request.model.name, request.settings, request.asked_at) for request in left]
        stopped = self.loop.create_task(self.residency.stop())
        self.requests.draining = True
        self.loop.advance(LIMITS.drain_s + 2 * TIMINGS.hang_s)
        assert stopped.done()
        self.nothing_is_wrong()
        assert self.within(self.residency.list) == []
        assert self.residency.resident_manifests() == set()
        assert self.machine.alive == {}
        assert self.machine.claims == {}
        assert asyncio.all_tasks(self.loop) == set()
        views = self.directory / "run" / "runners"
        assert not views.exists() or not list(views.iterdir())


class Shortness(Judge):
    """Tells whether memory may have been short for good when a request was refused."""

    def __init__(self, machine: ResidencyMachine) -> None:
        self._machine = machine
        #: Models that somebody has asked to keep for ever.
        self.kept: set[str] = set()
        self.gpu_was_lost = False
        self._others: list[tuple[float, dict[str, int]]] = []
        self.note_others()

    def note_others(self) -> None:
        """Remember what others use from now on."""
        machine = self._machine
        self._others.append((machine.loop.time(), {id_: c.other_bytes for id_, c in machine.machine.chips.items()}))

    def __call__(self, request: Request) -> bool:
        """A model may be refused before its time when it fits nowhere, also with everyone gone who may be evicted."""
        chips = self._machine.machine.chips
        need = SIZES[request.model.name].estimate(request.settings.num_ctx)
        others = [name for name in self.kept if name != request.model.name]
        # Of a name that has moved, older versions may be there that answer still.
        kept = [SIZES[name].estimate(4096).total_bytes for name in others + self._machine.moved]
        room = {id_: chips[id_].total_bytes - self._most_of_others(id_, request) - sum(kept) for id_ in chips}
        if request.settings.num_gpu != 99 or len(chips) == 1:
            return room[CPU] < need.total_bytes
        fits_a_gpu = any(room[id_] >= need.total_bytes for id_ in chips if id_ != CPU)
        return self.gpu_was_lost or not fits_a_gpu or room[CPU] < need.input_bytes

    def _most_of_others(self, device: str, request: Request) -> int:
        assert request.ended_at is not None
        before = [used[device] for at, used in self._others if at < request.asked_at][-1:]
        during = [used[device] for at, used in self._others if request.asked_at <= at <= request.ended_at]
        return max(before + during, default=0)


@pytest.mark.timeout(900)
class TestResidencyMachine(ResidencyMachine.TestCase):  # type: ignore[misc, valid-type]
    """Ten thousand steps."""


TestResidencyMachine.settings = settings(
    max_examples=100,
    stateful_step_count=100,
    deadline=None,
    # To make a failure smaller takes minutes; run it again with Phase.shrink for that.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
