"""A runner: a child process that holds one loaded model, its life from spawn to exit, and the requests it serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import structlog

from lmd.daemon.deadline import Deadline
from lmd.daemon.errors import (
    DeviceGone,
    HandedBack,
    ModelIncompatible,
    RunnerCrashed,
    RunnerHung,
    RunnerStartTimeout,
    TemplateFailed,
)
from lmd.daemon.futures import fail, resolve
from lmd.daemon.runner_answer import Answer
from lmd.daemon.runner_link import RunnerLink
from lmd.daemon.runner_log import RunnerLog
from lmd.daemon.runner_requests import RunnerRequests
from lmd.daemon.runner_spec import RunnerSpec, check_files, fill_view, make_view, runner_environment
from lmd.daemon.runner_stats import EngineStats
from lmd.registry.errors import LmdError
from lmd.runner.v1 import frames_pb2 as frames

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: How long the end of a runner waits for word of its devices.
DEVICES_S = 2.0

#: The ping that a spare has to answer before it gets a model, and how quickly; then a fresh process is as quick.
ADOPTION_NONCE = (1 << 32) - 1
ADOPTION_S = 0.5

#: The ping before a drain, by which a runner that has nothing to do shows that it turns.
LEAVING_NONCE = (1 << 32) - 2


class OutOfMemory(Exception):
    """Raised by a load that the engine, or the kernel's out-of-memory killer, ended; residency decides what follows."""


@dataclass(frozen=True, slots=True)
class RunnerExit:
    """How a runner ended: in words, whether that was asked for, and whether memory is the likely cause."""

    cause: str
    expected: bool
    probably_out_of_memory: bool


class RunnerProcess:
    """A spawned runner. One task supervises it from spawn until nothing of it is left.

    Every request ends exactly once: by what the runner says, or by the error of the runner's exit. Cancelling
    `start`, `load` or `stop` ends the process.
    """

    def __init__(self, spec: RunnerSpec) -> None:
        loop = asyncio.get_running_loop()
        self.name = spec.name
        self.hello: asyncio.Future[frames.Hello] = loop.create_future()
        self.exit: asyncio.Future[RunnerExit] = loop.create_future()
        #: What its engine did so far; a few seconds old, None before it says so.
        self.stats: EngineStats | None = None
        #: Asked when it ends by itself, for what is wrong with the devices that it was on; "" when nothing is.
        self.ask_devices: Callable[[], Awaitable[str]] | None = None
        self._ready: asyncio.Future[frames.Ready] = loop.create_future()
        self._spec = spec
        self._timings = spec.timings
        self._log = RunnerLog(spec.log_path)
        self._link = RunnerLink(self._on_frame, self._on_link_end)
        self._link_ended = asyncio.Event()
        self._link_fault: str | None = None
        self._requests = RunnerRequests(spec.name, self._link, self.log_tail)
        self._note_progress: Callable[[float], None] = lambda fraction: None
        self._pong_nonce = 0
        self._awake: asyncio.Future[None] = loop.create_future()
        self._leaving: asyncio.Future[None] = loop.create_future()
        self._stopping = False
        self._killed = False
        self._end_error: Callable[[], LmdError] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._view: Path | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, spec: RunnerSpec) -> Self:
        """Spawn a runner and wait for its hello.

        Raises:
            BlobMissing: a file of the model is gone.
            RunnerStartTimeout: it says nothing.
            RunnerCrashed: it dies, or what it says is not the protocol.
        """
        runner = cls(spec)
        await runner._spawn()
        await runner._or_kill(runner._greeted())
        return runner

    async def adopt(self, spec: RunnerSpec) -> None:
        """Take this runner, which was started without a model, for the model of *spec*; it must not be used before.

        Raises:
            BlobMissing: a file of the model is gone; the runner can be used for another one.
            RunnerCrashed, RunnerHung: it is not fit to be used, and is gone.
        """
        check_files(spec.weights, spec.draft, spec.adapters)
        assert self._view is not None, "it was never spawned"
        assert not self._spec.weights, "only a spare can be adopted"
        await self._or_kill(self._answers_ping())
        fill_view(self._view, spec.weights, spec.draft, spec.adapters)
        self.name, self._spec, self._timings = spec.name, spec, spec.timings
        self._requests.name = spec.name
        self._log.move(spec.log_path)
        log.info("runner_adopted", model=self.name, pid=self.pid)

    def when_loaded(self, callback: Callable[[], None]) -> None:
        """Call back once the load is over, one way or the other."""
        self._ready.add_done_callback(lambda _: callback())

    @property
    def pid(self) -> int:
        """The process id; 0 when there is no process."""
        return self._process.pid if self._process is not None and not self.exit.done() else 0

    @property
    def busy(self) -> int:
        """Requests that have a slot."""
        return self._requests.busy

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._requests.queue)

    @property
    def served(self) -> int:
        """Requests that it finished."""
        return self._requests.served

    @property
    def mean_answer_s(self) -> float:
        """How long its last answers took once they had a slot, in the mean; 0 when there was none."""
        return self._requests.mean_answer_s

    @property
    def pending(self) -> int:
        """Requests that wait, or may wait: answers without a slot, and calls without a reply."""
        return self._requests.pending

    def pending_of(self, caller: str) -> int:
        """Return how many of the pending are of *caller*."""
        return self._requests.pending_of(caller)

    def position(self, answer: Answer) -> int:
        """Return how many requests get a slot before this one, as far as is known."""
        return self._requests.queue.position(answer.request_id)

    def log_tail(self) -> str:
        """Return the last lines of its standard error."""
        return self._log.tail()

    async def load(self, load: frames.Load, on_progress: Callable[[float], None]) -> frames.Ready:
        """Load the model; *on_progress* gets fractions that grow. After a failure the process is gone.

        Raises:
            OutOfMemory: the memory did not suffice.
            ModelIncompatible, TemplateFailed: the engine refuses the model.
            RunnerStartTimeout: no progress for the stall deadline.
            RunnerCrashed: it died.
        """
        self._link.send(frames.DaemonFrame(load=load))
        return await self._or_kill(self._loaded(on_progress))

    async def submit(self, submit: frames.Submit, deadline: Deadline | None = None) -> Answer:
        """Hand in a request for an answer; its id and its time-out are set here.

        Raises:
            RunnerCrashed and others: the runner has ended, with the error of its end.
        """
        self._check_alive()
        return await self._requests.submit(submit, deadline or Deadline())

    async def call(self, frame: frames.DaemonFrame, deadline: Deadline | None = None) -> frames.RunnerFrame:
        """Ask for something that has one reply: `embed`, `tokenize`, `detokenize` or `render`; its id is set here.

        Cancelling takes the request back.

        Raises:
            DeadlineExceeded: there is no reply in time.
            RunnerCrashed and others: the runner has ended, with the error of its end.
            LmdError: what the runner failed the request with.
        """
        self._check_alive()
        return await self._requests.call(frame, deadline or Deadline())

    def hand_back(self) -> int:
        """Fail the answers that have no slot yet with `HandedBack`, and return how many: they are to ask again."""
        return self._requests.hand_back(lambda: HandedBack(self.name))

    async def stop(
        self, *, drain_s: float, save_s: float = 0.0, cut: Callable[[], LmdError] | None = None
    ) -> RunnerExit:
        """End the runner: drain for *drain_s* seconds, let it save KV for *save_s* more, then TERM, then KILL.

        Requests that still run after the drain fail with *cut*'s error. Without a drain nothing is saved. A runner
        that has nothing to do and does not even say that it heard of the drain, gets no more than a TERM's time.
        """
        self._stopping = True
        self._end_error = self._end_error or cut
        try:
            if drain_s > 0:
                self._link.send(frames.DaemonFrame(ping=frames.Ping(nonce=LEAVING_NONCE)))
                self._link.send(frames.DaemonFrame(drain=frames.Drain(save_ms=round(save_s * 1000))))
                if not self._requests and not await self._leaves_within(self._timings.term_s):
                    log.warning("runner_stuck", model=self.name, pid=self.pid)
                    self.kill()
            if drain_s <= 0 or not await self._exits_within(drain_s + save_s):
                self._signal(signal.SIGTERM)
                if not await self._exits_within(self._timings.term_s):
                    self.kill()
            return await asyncio.shield(self.exit)
        except asyncio.CancelledError:
            self.kill()
            raise

    def kill(self, error: Callable[[], LmdError] | None = None) -> None:
        """End the runner at once; its requests fail with *error*. The exit follows in a moment."""
        self._end_error = self._end_error or error
        self._killed = True
        self._signal(signal.SIGKILL)

    async def gone(self) -> None:
        """Wait until nothing of the runner is left: process, view, descriptors."""
        if self._supervisor is not None:
            await asyncio.wait([self._supervisor])

    async def _spawn(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as here:
            undo.callback(self._log.close)
            view = make_view(self._spec.views_dir, self._spec.weights, self._spec.draft, self._spec.adapters)
            undo.callback(shutil.rmtree, view, ignore_errors=True)
            ours, theirs = socket.socketpair()
            here.callback(theirs.close)
            # From here on the transports own our ends and close them, also when they cannot be made.
            await loop.create_unix_connection(lambda: self._link, sock=ours)
            undo.callback(self._link.close)
            log_reader, log_writer = os.pipe()
            here.callback(os.close, log_writer)
            await loop.connect_read_pipe(lambda: self._log, os.fdopen(log_reader, "rb", 0))
            self._process = await asyncio.create_subprocess_exec(
                *self._spec.command,
                "--fd",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log_writer,
                cwd=view,
                env=runner_environment(os.environ),
                start_new_session=True,
            )
            self._view = view
            self._supervisor = asyncio.create_task(self._supervise(self._process, view))
            undo.pop_all()
        log.info("runner_spawned", model=self.name, pid=self._process.pid)

    async def _supervise(self, process: asyncio.subprocess.Process, view: Path) -> None:
        """Wait for the exit, watch for a hung process meanwhile, and leave nothing behind."""
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [group.create_task(self._watch()), group.create_task(self._follow_link())]
                await process.wait()
                # What it started goes with it. Its id is not given away while its group has members; with none left, a
                # stranger would have to get just this id and lead a group within this line.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                for helper in helpers:
                    helper.cancel()
            with contextlib.suppress(TimeoutError):  # a process that the runner left behind may hold the pipe
                async with asyncio.timeout(1):
                    await self._log.closed.wait()
        finally:
            if process.returncode is None:
                self.kill()
            status = await process.wait()
            self._link.close()
            self._log.close()
            shutil.rmtree(view, ignore_errors=True)
            device_fault = "" if self._stopping or self._killed else await self._device_fault()
            self._settle(self._describe(status, device_fault))

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the runner and what it started; the session is its own."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def _device_fault(self) -> str:
        """Ask whether a device was lost. Whatever that comes to, the runner's end is told."""
        if self.ask_devices is None:
            return ""
        try:
            async with asyncio.timeout(DEVICES_S):
                return await self.ask_devices()
        except Exception as error:  # a driver that hangs or fails now is no news
            log.warning("device_fault_unknown", model=self.name, error=f"{type(error).__name__}: {error}")
            return ""

    def _describe(self, status: int, device_fault: str = "") -> RunnerExit:
        killed_by_others = status == -signal.SIGKILL and not self._killed
        if self._link_fault is not None:
            cause = f"it sent {self._link_fault}"
        elif killed_by_others:
            cause = "SIGKILL, most likely by the kernel because memory ran out"
        elif status < 0:
            cause = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        else:
            cause = f"exit status {status}"
        cause = f"{device_fault}; {cause}" if device_fault else cause
        return RunnerExit(cause, expected=self._stopping, probably_out_of_memory=killed_by_others)

    def _settle(self, ended: RunnerExit) -> None:
        """Give everyone who waits for this runner its end."""
        event = log.info if ended.expected else log.warning
        event("runner_exited", model=self.name, cause=ended.cause, requests=len(self._requests))
        self.exit.set_result(ended)  # first: whoever learns of an end may ask at once whether we are alive
        self._requests.end(lambda: self._error(ended))
        fail(self.hello, self._error(ended))
        fail(self._ready, OutOfMemory(ended.cause) if ended.probably_out_of_memory else self._error(ended))

    def _check_alive(self) -> None:
        if self.exit.done():
            raise self._error(self.exit.result())

    def _error(self, ended: RunnerExit) -> LmdError:
        if self._end_error is not None:
            return self._end_error()
        return RunnerCrashed(self.name, cause=ended.cause, log=self.log_tail())

    async def _follow_link(self) -> None:
        """End a runner that hung up and does not exit, or that talks nonsense."""
        await self._link_ended.wait()
        if self._link_fault is None:
            await asyncio.sleep(self._timings.term_s)
        self.kill()

    async def _watch(self) -> None:
        """Ping a ready runner, and end it when it stops answering.

        Silence is counted in ticks, not on the clock: while the machine or the daemon was suspended, no ticks passed.
        """
        await asyncio.wait([self._ready])
        nonce, silent_s, interval_s = 0, 0.0, self._timings.ping_interval_s
        while silent_s < self._timings.hang_s:
            if self._pong_nonce == nonce:
                nonce, silent_s = nonce + 1, 0.0
                self._link.send(frames.DaemonFrame(ping=frames.Ping(nonce=nonce)))
            await asyncio.sleep(interval_s)
            silent_s += interval_s
        self.kill(lambda: RunnerHung(self.name, timeout_s=self._timings.hang_s, log=self.log_tail()))

    def _on_frame(self, frame: frames.RunnerFrame) -> None:
        match frame.WhichOneof("frame"):
            case "pong" if frame.pong.nonce == ADOPTION_NONCE:
                resolve(self._awake, None)
            case "pong" if frame.pong.nonce == LEAVING_NONCE:
                resolve(self._leaving, None)
            case "pong":
                self._pong_nonce = frame.pong.nonce
                if frame.pong.HasField("stats"):
                    self.stats = EngineStats.of(frame.pong.stats)
            case "load_progress":
                self._note_progress(frame.load_progress.fraction)
            case "hello":
                resolve(self.hello, frame.hello)
            case "ready":
                resolve(self._ready, frame.ready)
            case "load_failed":
                self._note_load_failed(frame.load_failed)
            case kind:
                self._requests.take(kind, frame)

    def _on_link_end(self, fault: str | None) -> None:
        self._link_fault = fault
        self._link_ended.set()

    def _note_load_failed(self, failed: frames.LoadFailed) -> None:
        self._stopping = True
        match failed.kind:
            case frames.LoadFailed.KIND_OUT_OF_MEMORY:
                fail(self._ready, OutOfMemory(failed.message))
            case frames.LoadFailed.KIND_TEMPLATE:
                fail(self._ready, TemplateFailed(failed.message))
            case frames.LoadFailed.KIND_DEVICE_GONE:
                fail(self._ready, DeviceGone(self.name, failed.message))
            case _:
                fail(self._ready, ModelIncompatible(self.name, failed.message))

    async def _answers_ping(self) -> None:
        """Make sure that a runner that has waited for long still turns."""
        self._check_alive()
        self._link.send(frames.DaemonFrame(ping=frames.Ping(nonce=ADOPTION_NONCE)))
        either: list[asyncio.Future[Any]] = [self._awake, self.exit]
        await asyncio.wait(either, timeout=ADOPTION_S, return_when=asyncio.FIRST_COMPLETED)
        self._check_alive()
        if not self._awake.done():
            raise RunnerHung(self.name, timeout_s=ADOPTION_S, log=self.log_tail())

    async def _greeted(self) -> None:
        try:
            async with asyncio.timeout(self._timings.hello_s):
                await asyncio.shield(self.hello)
        except TimeoutError:
            raise RunnerStartTimeout(self.name, timeout_s=self._timings.hello_s, log=self.log_tail()) from None

    async def _loaded(self, on_progress: Callable[[float], None]) -> frames.Ready:
        """Wait for ready as long as the fraction grows."""
        loop, stall_s = asyncio.get_running_loop(), self._timings.load_stall_s
        last = 0.0
        try:
            async with asyncio.timeout(stall_s) as deadline:

                def note_progress(fraction: float) -> None:
                    nonlocal last
                    if fraction > last and not deadline.expired():
                        last = fraction
                        deadline.reschedule(loop.time() + stall_s)
                        on_progress(fraction)

                self._note_progress = note_progress
                return await asyncio.shield(self._ready)
        except TimeoutError:
            raise RunnerStartTimeout(self.name, timeout_s=stall_s, log=self.log_tail()) from None
        finally:
            self._note_progress = lambda fraction: None

    async def _or_kill(self, work: Awaitable[T]) -> T:
        """Return what *work* returns; when it fails or is cancelled, leave no process behind."""
        try:
            return await work
        except BaseException:
            self.kill()
            await self.gone()
            raise

    async def _leaves_within(self, timeout_s: float) -> bool:
        """Return whether it has answered the ping before the drain in time, or has ended."""
        either: list[asyncio.Future[Any]] = [self._leaving, self.exit]
        done, _ = await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)

    async def _exits_within(self, timeout_s: float) -> bool:
        await asyncio.wait([self.exit], timeout=timeout_s)
        return self.exit.done()
