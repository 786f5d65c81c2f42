"""Running a command under a lease of memory: waiting for the lease, passing signals on, noticing its end."""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from lmd.cli.context import App, note, warn
from lmd.cli.errors import ClientError
from lmd.cli.spinner import Spinner
from lmd.cli.ticking import with_ticks
from lmd.cli.units import format_size, format_span
from lmd.v1 import runtime_service_pb2 as pb

#: What shells say of a command that cannot be run, or is not there.
EXIT_CANNOT_RUN, EXIT_NO_COMMAND = 126, 127

#: Passed on to the command. A stop is left alone: the terminal stops both.
PASSED_ON = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
#: A terminal sends these to every process in its foreground, so to the command as well.
_OF_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


class CommandFailed(ClientError):
    """Raised when the command cannot be started; the exit status is the one that shells give."""

    def __init__(self, words: Sequence[str], error: OSError) -> None:
        super().__init__(f"cannot run `{words[0]}`: {error.strerror}", reason="USAGE")
        self._missing = isinstance(error, FileNotFoundError)

    @property
    def exit_code(self) -> int:
        """The exit status of `lm`."""
        return EXIT_NO_COMMAND if self._missing else EXIT_CANNOT_RUN


def run_leased(app: App, words: Sequence[str], *, size_bytes: int, device: str, wait_s: float | None) -> int:
    """Run a command while memory is leased for it; return its exit status.

    Raises:
        CommandFailed: it cannot be started.
        ClientError: the memory cannot be had, or not within *wait_s*.
    """
    request = pb.LeaseMemoryRequest(bytes=size_bytes, device=device, purpose=shlex.join(words), pid=os.getpid())
    with app.daemon() as client, client.stream(client.runtime.LeaseMemory, request) as events:
        ticks = with_ticks(events)
        granted = _granted(ticks, wait_s)
        if app.verbose:
            note(f"leased {format_size(granted.bytes)} of {granted.device}")
        with _noticing_the_end(ticks):
            return _run(words)


def _granted(ticks: Iterator[pb.LeaseMemoryResponse | None], wait_s: float | None) -> pb.DeviceShare:
    """Wait for the lease, with a spinner meanwhile."""
    deadline = time.monotonic() + wait_s if wait_s is not None and wait_s >= 0 else None
    detail = ""
    spinner = Spinner()
    try:
        for event in ticks:
            if event is not None and event.HasField("granted"):
                return event.granted
            if event is not None and event.HasField("waiting"):
                detail = event.waiting
                spinner.say(detail)
            if deadline is not None and time.monotonic() >= deadline:
                raise ClientError(
                    f"the memory was not there after {format_span(wait_s or 0)}",
                    reason="DEADLINE_EXCEEDED",
                    hint="wait longer, ask for less, or stop a model with `lm stop`",
                    context=[detail] if detail else [],
                )
            spinner.refresh()
    finally:
        spinner.clear()
    raise ClientError("the daemon ended the lease before it began", reason="INTERNAL")


@contextmanager
def _noticing_the_end(ticks: Iterator[pb.LeaseMemoryResponse | None]) -> Iterator[None]:
    """Warn when the lease ends before the block does."""
    done = threading.Event()

    def watch() -> None:
        why = "the daemon ended it"
        try:
            for _ in ticks:
                if done.is_set():
                    return
        except ClientError as error:
            why = error.message
        if not done.is_set():
            warn(f"the lease is lost: {why}; the command goes on without it")

    threading.Thread(target=watch, name="lease", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _run(words: Sequence[str]) -> int:
    """Run the command to its end, passing signals on; return its exit status as shells do."""
    with _woken_by_signals() as woken:
        try:
            child = subprocess.Popen(words)  # noqa: S603 - what the user typed
        except OSError as error:
            raise CommandFailed(words, error) from error
        # Not wait(): a signal that another thread gets would not wake it.
        while child.poll() is None:
            select.select([woken], [], [])
            for number in os.read(woken, 4096):
                if number in PASSED_ON and not (number in _OF_TERMINAL and _in_foreground()):
                    child.send_signal(number)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


@contextmanager
def _woken_by_signals() -> Iterator[int]:
    """Yield a pipe that gets the number of each signal, the end of a child included; signals do nothing else."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def nothing(_number: int, _frame: FrameType | None) -> None:
        pass

    before = {number: signal.signal(number, nothing) for number in (*PASSED_ON, signal.SIGCHLD)}
    wakeup_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        yield woken
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(woken)
        os.close(wake)


def _in_foreground() -> bool:
    """Whether a terminal sends its signals to us and to the command alike."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
