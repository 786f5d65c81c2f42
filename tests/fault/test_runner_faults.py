"""Runners that die, hang or are stopped at every point of their life: exactly their own requests are told, and why."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lmd.daemon.errors import DeviceMemoryShort, RunnerCrashed, RunnerHung, RunnerStartTimeout
from lmd.daemon.residency.values import RunnerState
from lmd.daemon.runner_process import RunnerProcess
from lmd.daemon.runner_spec import RunnerSpec, RunnerTimings
from lmd.registry.errors import LmdError
from tests.support.fake_runner import FAKE_COMMAND, Script, write_model
from tests.support.leaks import nothing_left_in, until
from tests.support.residents import QUICK, Model, World

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

#: Short enough to wait for, and long enough for a busy machine.
HASTY = RunnerTimings(hello_s=30, load_stall_s=2, ping_interval_s=0.1, hang_s=2, term_s=0.3)

KILL, STOP, ABORT = signal.SIGKILL, signal.SIGSTOP, signal.SIGABRT
SIGNALS = pytest.mark.parametrize("number", [KILL, STOP, ABORT], ids=lambda number: number.name)

#: What the requests of a runner get that is hit while it has a slot for them.
ENDS = {KILL: RunnerCrashed, STOP: RunnerHung, ABORT: RunnerCrashed}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    with nothing_left_in(tmp_path / "run" / "runners"):
        made = World(tmp_path, timings=HASTY)
        yield made
        await made.close()


@pytest.fixture
async def bystander(world: World) -> AsyncIterator[asyncio.Task[str]]:
    """An answer of another model, which no fault may touch."""
    task = await world.holding(world.model("bystander"))
    yield task
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def pid_of(world: World, model: Model) -> int:
    status = world.status(model)
    assert status is not None
    assert status.pid
    return status.pid


def loading_pid(world: World) -> int:
    """The process of the runner that is not ready yet, which is not listed."""
    ready = {status.pid for status in world.residency.list()}
    (pid,) = [child.pid for child in psutil.Process().children() if child.pid not in ready]
    return pid


async def end_of(task: asyncio.Task[str]) -> LmdError:
    with pytest.raises(LmdError) as caught:
        await task
    return caught.value


@SIGNALS
async def test_while_loading(world: World, bystander: asyncio.Task[str], number: signal.Signals) -> None:
    gate = world.path / "gate"
    model = world.model("a", gate=str(gate), journal=world.journal(), stderr="last words")
    waiting = [asyncio.create_task(world.ask(model, f"word{n}")) for n in range(3)]
    await until(lambda: len(world.loads()) == 1)
    os.kill(loading_pid(world), number)
    ends = [await end_of(task) for task in waiting]
    # A kill from outside is most likely the kernel's, for want of memory; and nobody idle could make room.
    expected = {KILL: DeviceMemoryShort, STOP: RunnerStartTimeout, ABORT: RunnerCrashed}[number]
    assert [type(end) for end in ends] == [expected] * 3
    if number is not KILL:
        assert all("last words" in end.metadata["log"] for end in ends)
    assert len(world.loads()) == 1  # one failure for all who waited, and no storm of loads
    gate.touch()
    assert await world.ask(model, "again") == "again "


@SIGNALS
async def test_while_it_reads_a_prompt(world: World, bystander: asyncio.Task[str], number: signal.Signals) -> None:
    await hit_while(world, "read", number)


@SIGNALS
async def test_while_it_generates(world: World, bystander: asyncio.Task[str], number: signal.Signals) -> None:
    await hit_while(world, "hold", number)


async def hit_while(world: World, prompt: str, number: signal.Signals) -> None:
    """Hit a runner with two running requests and one that waits for a slot."""
    model = world.model("a", journal=world.journal(), stderr="last words")
    running = [await world.holding(model, prompt) for _ in range(2)]
    queued = asyncio.create_task(world.ask(model, "queued"))
    await until(lambda: (s := world.status(model)) is not None and s.queued == 1)
    os.kill(pid_of(world, model), number)
    for task in [*running, queued]:  # who asks through `Inference` is handed to the next runner; see its tests
        end = await end_of(task)
        assert type(end) is ENDS[number]
        assert end.metadata["name"] == model.name
        assert "last words" in end.metadata["log"]
        if number is not STOP:
            assert number.name in end.message
    assert await world.ask(model, "again") == "again "
    assert len(world.loads()) == 2


@SIGNALS
async def test_while_idle(world: World, bystander: asyncio.Task[str], number: signal.Signals) -> None:
    model = world.model("a", journal=world.journal())
    await world.ask(model, "x")
    pid = pid_of(world, model)
    os.kill(pid, number)
    await until(lambda: world.state(model) is RunnerState.FAILED)
    await until(lambda: not psutil.pid_exists(pid))
    status = world.status(model)
    assert status is not None
    assert (number.name if number is not STOP else "SIGKILL") in status.reason
    assert await world.ask(model, "again") == "again "


async def test_one_that_is_stopped_for_a_moment_goes_on(world: World) -> None:
    """A debugger, or a machine that was suspended: silence shorter than the deadline is no fault."""
    world.timings = replace(QUICK, hang_s=60)
    model = world.model("a")
    gate = world.path / "gate"
    running = await world.holding(model, f"gate {gate}")
    pid = pid_of(world, model)
    os.kill(pid, STOP)
    await until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    os.kill(pid, signal.SIGCONT)
    gate.touch()
    assert await running == "x"


async def test_a_runner_that_is_gone_is_never_signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may belong to another process by then, even to the runner of another model."""
    spec = RunnerSpec(
        name="a:latest",
        weights=(write_model(tmp_path / "a", Script()),),
        views_dir=tmp_path / "views",
        log_path=tmp_path / "log",
        command=FAKE_COMMAND,
        timings=QUICK,
    )
    runner = await RunnerProcess.start(spec)
    os.kill(runner.pid, KILL)
    await runner.gone()
    signalled: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: signalled.append(pid))
    runner.kill()
    await runner.stop(drain_s=1)
    assert runner.pid == 0
    assert signalled == []


async def test_two_runners_never_share_a_socket(world: World) -> None:
    """llama.cpp #10952: a port that was handed out again answered for another model."""
    a, b = world.model("a"), world.model("b")
    first = await world.holding(a)
    os.kill(pid_of(world, a), KILL)
    await end_of(first)
    # The ids of requests begin anew, and what the dead runner may still have had to say is for nobody.
    texts = await asyncio.gather(*(world.ask(model, f"{model.name[0]}{n}") for n in range(5) for model in (a, b)))
    assert texts == [f"{name}{n} " for n in range(5) for name in "ab"]


@pytest.fixture
def daemon_like(tmp_path: Path) -> Path:
    """A program that starts a runner as the daemon does, tells its number, and waits."""
    script = tmp_path / "parent.py"
    script.write_text(
        """
import asyncio, sys
from pathlib import Path
from lmd.daemon.runner_process import RunnerProcess
from lmd.daemon.runner_spec import RunnerSpec

async def main() -> None:
    here = Path(sys.argv[1])
    spec = RunnerSpec(name="a", weights=(here / "model",), views_dir=here / "views", log_path=here / "log")
    runner = await RunnerProcess.start(spec)
    print(runner.pid, file=sys.stderr, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
    )
    (tmp_path / "model").write_bytes(b"")
    return script


async def test_a_runner_dies_with_the_daemon(daemon_like: Path, tmp_path: Path) -> None:
    """Ollama's runners survived a daemon that was killed, and held the memory of the accelerator."""
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        str(daemon_like),
        str(tmp_path),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert parent.stderr is not None
    pid = int(await parent.stderr.readline())
    runner = psutil.Process(pid)
    # A stopped one does not notice that its socket has ended: only the kernel can end it.
    runner.suspend()
    await until(lambda: runner.status() == psutil.STATUS_STOPPED)
    parent.kill()
    await parent.wait()
    await until(lambda: not runner.is_running() or runner.status() == psutil.STATUS_ZOMBIE)
