"""Runners without processes: the daemon's own `RunnerProcess` over the scripted fake, all on one event loop.

They start in microseconds, so a test can have thousands, and on a `VirtualLoop` the same ones each time. All that a
process does to its daemon is there: frames, standard error, exit status, signals, silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NoReturn, cast

from lmd.daemon.runner_process import RunnerProcess
from lmd.daemon.runner_spec import RunnerSpec, make_view
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.fake_runner import Fake, Script, script_in

#: Above every process id of Linux: a signal that escapes meets nobody.
_FIRST_PID = 1 << 23


class Host:
    """Starts runners and knows those that live. *delay* is how long whatever goes between them and us takes."""

    def __init__(self, delay: Callable[[], float] = lambda: 0.0) -> None:
        self.delay = delay
        self.alive: dict[int, FakeProcess] = {}
        self._pids = itertools.count(_FIRST_PID)
        self._kind: type[InProcessRunner] = type("HostedRunner", (InProcessRunner,), {"host": self})

    async def start(self, spec: RunnerSpec) -> RunnerProcess:
        """Do what `RunnerProcess.start` does."""
        return await self._kind.start(spec)

    def spawn(self, view: Path, runner: InProcessRunner) -> FakeProcess:
        """Begin a process."""
        process = FakeProcess(self, next(self._pids), view, self.amend(script_in(view)), runner)
        self.alive[process.pid] = process
        self.spawned(process)
        return process

    # What tests of whole machines change.

    def amend(self, script: Script) -> Script:
        """Return how a process that starts now behaves, by whatever its model says."""
        return script

    def spawned(self, process: FakeProcess) -> None:
        """Note a new process."""

    async def before_load(self, fake: InProcessFake) -> None:
        """Do what a load has to do before the engine begins; it may end the process."""

    def amend_ready(self, fake: InProcessFake, ready: frames.Ready) -> frames.Ready:
        """Return what a loaded process says of itself."""
        return ready

    def ended(self, process: FakeProcess) -> None:
        """Note that nothing is left of a process."""


class InProcessRunner(RunnerProcess):
    """A `RunnerProcess` whose process is a task."""

    host: ClassVar[Host]
    _deaf = False

    async def _spawn(self) -> None:
        view = make_view(self._spec.views_dir, self._spec.weights, self._spec.draft, self._spec.adapters)
        process = self.host.spawn(view, self)
        self._process = cast(asyncio.subprocess.Process, process)
        self._view = view
        self._link.connection_made(process.transport)
        self._supervisor = asyncio.create_task(self._supervise(self._process, view))

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    @property
    def spec(self) -> RunnerSpec:
        """What it was started with, or, for a spare, what it became."""
        return self._spec

    def say(self, line: str) -> None:
        """Receive a line of the standard error."""
        self._log.data_received(f"{line}\n".encode())

    def hear(self, data: bytes) -> None:
        """Receive bytes of frames; none are the end of them, and after that nothing comes."""
        if self._deaf:
            return
        if data:
            self._link.data_received(data)
        else:
            self._deaf = True
            self._link.connection_lost(None)

    def hang_up(self) -> None:
        """Note that nobody holds the standard error any more."""
        self._log.connection_lost(None)


class FakeProcess:
    """What stands for a process: it has a pid, obeys signals, and ends with a status."""

    def __init__(self, host: Host, pid: int, view: Path, script: Script, runner: InProcessRunner) -> None:
        self.pid = pid
        self.view = view
        self.script = script
        self.returncode: int | None = None
        self.frozen = False
        #: How it ends or has ended, once that is certain.
        self.fate: int | None = None
        self._host = host
        self._runner = runner
        self._terminates = False
        self._exited = asyncio.Event()
        reader = asyncio.StreamReader(limit=1 << 27)
        self._out = Pipe(self, host.delay, self._say)
        self._in = Pipe(self, host.delay, lambda data: reader.feed_data(data) if data else reader.feed_eof())
        self.transport = LinkTransport(self._in, runner)
        self.fake = InProcessFake(reader, self._out, script, self, host)
        self._main = asyncio.create_task(self._run(), name=f"runner-{pid}")

    @property
    def spec(self) -> RunnerSpec:
        """What it was started with, or, for a spare, what it became."""
        return self._runner.spec

    async def wait(self) -> int:
        """Return the exit status, when there is one."""
        await self._exited.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Do what the kernel does with a signal to it."""
        if self.fate is not None:
            return
        match number:
            case signal.SIGSTOP:
                self.frozen = True
            case signal.SIGCONT:
                self.frozen = False
                self._in.flow()
                self._out.flow()
                if self._terminates:
                    self.end(-signal.SIGTERM)
            case signal.SIGTERM if not self.script.obeys_term:
                return
            case signal.SIGTERM if self.frozen:
                self._terminates = True
            case _:
                self.end(-number)

    def end(self, status: int) -> None:
        """End: nothing more is done, and the parent hears of it in a moment."""
        if self.fate is not None:
            return
        self.fate = status
        self._main.cancel()
        for task in self.fake.running.values():
            task.cancel()
        self.frozen = False
        self._out.flow()
        self._out.send(b"")

    async def _run(self) -> None:
        await asyncio.sleep(self._host.delay())
        self._runner.say(self.script.stderr)
        with contextlib.suppress(asyncio.IncompleteReadError):
            await self.fake.run()
        self.end(0)

    def _say(self, data: bytes) -> None:
        """Let the parent read; nobody hears of an exit before what was said until then has arrived."""
        self._runner.hear(data)
        if not data:
            asyncio.get_running_loop().call_later(self._host.delay(), self._reap)

    def _reap(self) -> None:
        assert self.fate is not None
        self.returncode = self.fate
        del self._host.alive[self.pid]
        self._host.ended(self)
        self._runner.hang_up()
        self._exited.set()


class Pipe:
    """One direction between a process and us: in order, after a while, and not while the process is frozen."""

    def __init__(self, process: FakeProcess, delay: Callable[[], float], deliver: Callable[[bytes], None]) -> None:
        self._process = process
        self._delay = delay
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._sent: deque[bytes] = deque()
        self._due = 0
        self._last_at = 0.0

    def send(self, data: bytes) -> None:
        """Send *data*; none are the end."""
        self._sent.append(data)
        self._last_at = max(self._last_at, self._loop.time() + self._delay())
        self._loop.call_at(self._last_at, self._arrive)

    def write(self, data: bytes) -> None:
        """Send from within the process; the dead say nothing."""
        if self._process.fate is None:
            self.send(data)

    async def drain(self) -> None:
        """Let others run."""
        await asyncio.sleep(0)

    def flow(self) -> None:
        """Deliver what has arrived meanwhile."""
        while self._due and not self._process.frozen:
            self._due -= 1
            self._deliver(self._sent.popleft())

    def _arrive(self) -> None:
        self._due += 1
        self.flow()


class LinkTransport(asyncio.Transport):
    """Our end of the connection."""

    def __init__(self, pipe: Pipe, runner: InProcessRunner) -> None:
        super().__init__()
        self._pipe = pipe
        self._runner = runner
        self._closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send."""
        if not self._closed:
            self._pipe.send(bytes(data))

    def is_closing(self) -> bool:
        """Whether it is closed."""
        return self._closed

    def abort(self) -> None:
        """Close."""
        if not self._closed:
            self._closed = True
            self._pipe.send(b"")
            asyncio.get_running_loop().call_soon(self._runner.hear, b"")

    close = abort


class InProcessFake(Fake):
    """The fake runner, as a part of this process."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: Pipe, script: Script, process: FakeProcess, host: Host
    ) -> None:
        super().__init__(reader, writer, script)
        self.process = process
        self.host = host

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit(self, status: int) -> NoReturn:
        self.process.end(status)
        raise asyncio.CancelledError

    def die(self, number: signal.Signals) -> NoReturn:
        self.process.end(-number)
        raise asyncio.CancelledError

    async def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        await asyncio.Event().wait()

    def read_script(self) -> Script:
        return self.host.amend(script_in(self.process.view))

    def check_files(self) -> None:
        for name in (*self.load.model_paths, *self.load.draft_paths, *(adapter.path for adapter in self.load.adapters)):
            (self.process.view / name).read_bytes()

    async def do_load(self) -> None:
        await self.host.before_load(self)
        await super().do_load()

    def ready(self) -> frames.Ready:
        return self.host.amend_ready(self, super().ready())
