"""A daemon process whose application serves no models: `python -m tests.support.fake_application [LMD OPTIONS]`.

What happens to it is appended to the file `events` in the state directory.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from starlette.responses import PlainTextResponse

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.config import Config
from lmd.daemon.devices import Device, main_memory
from lmd.daemon.dropin_folder import Obstacle
from lmd.daemon.main import launch
from lmd.daemon.metrics import Metrics
from lmd.daemon.server import AddServicer
from lmd.registry.errors import DiskFull, StoreLocked
from tests.support.http_probe import HttpProbe
from tests.support.shell_daemon import Probe

if TYPE_CHECKING:
    from lmd.daemon.http.gateway import HttpApplication


class FakeApplication:
    def __init__(self, config: Config, pool: BlockingPool, metrics: Metrics) -> None:
        self._state = config.dirs.state
        self._probe = Probe()
        self._lock: IO[str] | None = None

    @property
    def servicers(self) -> Sequence[AddServicer]:
        return [self._probe.add]

    def devices(self) -> Sequence[Device]:
        return [main_memory()]

    async def start(self) -> None:
        if os.environ.get("TEST_START") == "hangs":
            self._note("starting")
            await asyncio.Event().wait()
        if os.environ.get("TEST_START") == "fails":
            raise ZeroDivisionError("a defect")
        if os.environ.get("TEST_START") == "finds the disk full":
            raise DiskFull(needed_bytes=65536, free_bytes=0, where=str(self._state))
        self._state.mkdir(parents=True, exist_ok=True)
        lock = (self._state / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            pid = lock.read()
            lock.close()
            raise StoreLocked(f"the store is in use by pid {pid}", operation="open", hint=f"kill {pid}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        self._note("started")

    def obstacles(self) -> Sequence[Obstacle]:
        return ()

    def http(self) -> HttpApplication:
        from lmd.daemon.http.gateway import HttpApplication

        probe = HttpProbe()
        return HttpApplication(probe, lambda path, status, message: PlainTextResponse(message, status_code=status))

    async def drain(self) -> None:
        self._note("drained")

    def cut(self) -> None:
        """Nothing here runs in a runner."""

    async def stop(self) -> None:
        self._note("stopped")
        if self._lock is not None:
            self._lock.close()

    def _note(self, event: str) -> None:
        self._state.mkdir(parents=True, exist_ok=True)
        with (self._state / "events").open("a") as file:
            file.write(f"{event}\n")


def main() -> None:
    home = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    sys.exit(launch(os.environ, lambda: FakeApplication, home=home))


if __name__ == "__main__":
    main()
