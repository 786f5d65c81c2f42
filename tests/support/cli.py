"""Running `lm` in tests: inside the test's process, as a process, and as a process on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmd.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("daemon", "cli", "registry", "protos", ".")
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[a-zA-Z]|[=>]|\][^\x07]*\x07)")
_DEADLINE_S = 30.0

#: Makes the terminal on stdin the controlling one, so that Ctrl-C reaches the command it then becomes.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def lm(capsys: pytest.CaptureFixture[str], *args: str) -> Result:
    """Run `lm` in this process; stdout and stderr are no terminals."""
    capsys.readouterr()
    code = run(args)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for an `lm` process that runs from the checkout."""
    paths = os.pathsep.join(str(ROOT / source) for source in _SOURCES)
    # Unbuffered text streams lose the rest of a partial write, and with it the news that a pipe is closed.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "PYTHONPATH": paths, "PYTHONWARNINGS": "default", **(extra or {})}


def command(*args: str) -> list[str]:
    """Return the command line of `lm` with *args*."""
    return [sys.executable, "-m", "lmd.cli.main", *args]


def lm_process(*args: str, stdin: str | None = None, env: Mapping[str, str] | None = None) -> Result:
    """Run `lm` as a process without a terminal."""
    done = subprocess.run(
        command(*args),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        env=environment(env),
        timeout=_DEADLINE_S,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


class Terminal:
    """A process on a terminal of its own, which a test reads and types into."""

    def __init__(self, args: Sequence[str], *, env: Mapping[str, str], columns: int = 80, rows: int = 24) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**env, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        self._slave = slave
        #: Everything written so far, and the part no `expect` has passed yet.
        self.raw = ""
        self._unread = ""

    def is_echoing(self) -> bool:
        """Return whether typed keys show by themselves."""
        return bool(termios.tcgetattr(self._slave)[3] & termios.ECHO)

    def type(self, text: str) -> None:
        """Type *text*; "\\x03" is Ctrl-C, "\\r" is Enter."""
        os.write(self._master, text.encode())

    def expect(self, pattern: str) -> str:
        """Read until *pattern* appears, colours and cursor movements aside; return the text up to its end."""
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            plain = _ESCAPES.sub("", self._unread)
            found = re.search(pattern, plain)
            if found:
                self._unread = plain[found.end() :]
                return plain[: found.end()]
            if not self._read_more(deadline):
                raise AssertionError(f"no {pattern!r} in {plain!r}")

    def wait(self) -> int:
        """Read until the process ends and return its exit status."""
        deadline = time.monotonic() + _DEADLINE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read_more(time.monotonic() + 0.05)
        return self.process.wait(timeout=1)

    def rest(self) -> str:
        """Return what was written since the last `expect`, colours and cursor movements aside."""
        while self._read_more(time.monotonic()):
            pass
        return _ESCAPES.sub("", self._unread)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the terminal."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def _read_more(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            text = os.read(self._master, 65536).decode(errors="replace")
        except OSError:
            return False
        self.raw += text
        self._unread += text
        self._answer_questions(text)
        return True

    def _answer_questions(self, text: str) -> None:
        """Answer a program that asks where the cursor is, as terminals do."""
        if "\x1b[6n" in text:
            os.write(self._master, b"\x1b[1;1R")

    def close(self) -> None:
        """End the process and give the terminal back."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._slave)
        os.close(self._master)


@contextlib.contextmanager
def terminal(*args: str, env: Mapping[str, str] | None = None, columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    """Run `lm` with *args* on a terminal."""
    opened = Terminal(command(*args), env=environment(env), columns=columns, rows=rows)
    try:
        yield opened
    finally:
        opened.close()
