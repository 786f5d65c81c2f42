"""A runner without a model that stands ready, so that a load does not wait for a process to start."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from lmd.daemon.residency.plans import DeviceMemory
from lmd.daemon.runner_process import RunnerProcess
from lmd.daemon.runner_spec import RunnerSpec, RunnerTimings
from lmd.registry.errors import BlobMissing, LmdError

log = structlog.get_logger(__name__)

#: What has to be free beside the reserve for a spare to be started; it takes less.
ROOM_BYTES = 256 << 20
#: After a load the processor belongs to the first answers of the model.
DELAY_S = 2.0


@dataclass(frozen=True, slots=True)
class SpareSettings:
    """How spares are started."""

    command: Sequence[str]
    timings: RunnerTimings
    views_dir: Path
    log_dir: Path
    reserve_bytes: int
    delay_s: float = DELAY_S

    def spec(self) -> RunnerSpec:
        """Return what a spare is started with."""
        return RunnerSpec(
            name="(spare)",
            weights=(),
            views_dir=self.views_dir,
            log_path=self.log_dir / "runner-spare.log",
            command=self.command,
            timings=self.timings,
        )


class SpareRunner:
    """Starts runners, from the spare when there is one; the next spare follows when the load is over.

    Until a first model is loaded there is none: a daemon that nobody uses stays small. One that dies is not replaced
    before the next load, so that a machine on which runners cannot live is not kept busy. It is no resident: it holds
    no memory in the ledger, and is not listed.
    """

    def __init__(
        self,
        settings: SpareSettings,
        read_devices: Callable[[], Awaitable[Sequence[DeviceMemory]]],
        start: Callable[[RunnerSpec], Awaitable[RunnerProcess]] = RunnerProcess.start,
    ) -> None:
        self._settings = settings
        self._read_devices = read_devices
        self._start = start
        self._spare: RunnerProcess | None = None
        self._starting: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def pid(self) -> int:
        """The spare's process id; 0 when there is none."""
        return self._spare.pid if self._spare is not None else 0

    async def start(self, spec: RunnerSpec) -> RunnerProcess:
        """Return a runner for *spec* that has said hello; as `RunnerProcess.start`."""
        runner = await self._taken(spec) or await self._start(spec)
        runner.when_loaded(self._replace)
        return runner

    async def stop(self) -> None:
        """End the spare. Idempotent."""
        self._closing = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._drop()

    async def _taken(self, spec: RunnerSpec) -> RunnerProcess | None:
        spare, self._spare = self._spare, None
        if spare is None or (spec.command, spec.timings) != (self._settings.command, self._settings.timings):
            self._spare = spare
            return None
        try:
            await spare.adopt(spec)
        except BlobMissing:
            self._spare = spare
            raise
        except LmdError as error:
            log.warning("spare_runner_unfit", error=error.message)
            return None
        return spare

    def _replace(self) -> None:
        if not self._closing and self._starting is None and not self.pid:
            self._starting = asyncio.create_task(self._start_spare(), name="spare-runner")
            self._starting.add_done_callback(self._note_started)

    def _note_started(self, task: asyncio.Task[None]) -> None:
        self._starting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("spare_runner_not_started", error=str(error))

    async def _start_spare(self) -> None:
        await asyncio.sleep(self._settings.delay_s)
        free_bytes = next((device.free_bytes for device in await self._read_devices() if device.id == "cpu"), 0)
        if free_bytes < self._settings.reserve_bytes + ROOM_BYTES:
            log.info("spare_runner_skipped", free_bytes=free_bytes)
            return
        await self._drop()
        self._spare = await self._start(self._settings.spec())

    async def _drop(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            await spare.stop(drain_s=0)
            await spare.gone()
