"""Drives the installed `lm` and `lmd` as a user does: as processes, on a private home."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 30.0


def command(name: str) -> str:
    """Return the path of an installed console script."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"`{name}` is not installed; run the tests with `make test`")
    return found


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Return as soon as *condition* holds; fail with *what* at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not after {timeout_s:g} s: {what}")
        time.sleep(0.01)


@dataclass
class Daemon:
    """A running `lmd`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self, timeout_s: float = 30.0) -> int:
        """End it as systemd does; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@dataclass
class Product:
    """An installation with all its files under *home*."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)
    daemons: list[Daemon] = field(default_factory=list)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        keep = ("PATH", "HOME", "LANG", "TMPDIR", "USER", "PYTHONPATH", "VIRTUAL_ENV")
        env = {name: os.environ[name] for name in keep if name in os.environ}
        env |= {"LMD_HOME": str(self.home), "LANG": "C.UTF-8", "TERM": "dumb"}
        # Daemons of several tests run at once; `http_url` tells the port.
        env |= {"LMD_HTTP_LISTEN": "127.0.0.1:0"}
        return env | self.env | dict(extra or {})

    @property
    def socket(self) -> Path:
        return self.home / "run" / "lmd.sock"

    @property
    def http_url(self) -> str:
        """Where the running daemon's HTTP gateway answers: "http://127.0.0.1:PORT"."""
        url: str = self.json("status")["http"]
        assert url, "the daemon has no HTTP gateway"
        return url

    def lm(
        self,
        *args: str,
        stdin: str | None = None,
        code: int | None = 0,
        timeout_s: float = 60.0,
        env: Mapping[str, str] | None = None,
        start: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run `lm` to its end; *code* is the expected exit status, None for any."""
        options = [] if start else ["--no-start"]
        done = subprocess.run(
            [command("lm"), *options, *args],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environment(env),
        )
        if code is not None:
            assert done.returncode == code, f"lm {args} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *args: str) -> Any:
        """Run `lm … --json` and parse its standard output."""
        return json.loads(self.lm(*args, "--json").stdout)

    def spawn_lm(self, *args: str) -> subprocess.Popen[str]:
        """Start `lm` and return at once."""
        return subprocess.Popen(
            [command("lm"), "--no-start", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )

    def start(self, *argv: str, **env: str) -> Daemon:
        """Start `lmd`, or the daemon that *argv* starts, and return when it says READY=1 (sd_notify)."""
        log = self.home / f"lmd-{len(self.daemons)}.log"
        with contextlib.ExitStack() as stack:
            notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            address = self.home / "notify.sock"
            address.unlink(missing_ok=True)
            notify.bind(str(address))
            notify.settimeout(0.1)
            out = stack.enter_context(log.open("wb"))
            process = subprocess.Popen(
                argv or [command("lmd")],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment(env | {"NOTIFY_SOCKET": str(address)}),
            )
            daemon = Daemon(process, log)
            self.daemons.append(daemon)
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in notify.recv(4096):
                        return daemon
                if process.poll() is not None:
                    raise AssertionError(f"lmd ended with {process.returncode}\n{log.read_text()}")
                if time.monotonic() > deadline:
                    raise AssertionError(f"lmd is not ready\n{log.read_text()}")

    def close(self) -> None:
        """End every daemon that still runs, autostarted ones too."""
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.kill()
        if self.socket.exists():
            self.lm("serve", "--stop", code=None)


@contextlib.contextmanager
def installed(home: Path, **env: str) -> Iterator[Product]:
    """Yield a product on *home* and end what it started."""
    product = Product(home, dict(env))
    try:
        yield product
    finally:
        product.close()
