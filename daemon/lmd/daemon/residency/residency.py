"""Which models are resident: the front of the actors, and what they share."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import structlog

from lmd.daemon.config import Config
from lmd.daemon.devices import Device, main_memory
from lmd.daemon.errors import Draining
from lmd.daemon.parameters import context_floor, effective, load_settings, usable_kv_type
from lmd.daemon.rated_bandwidth import rated_bandwidth
from lmd.daemon.residency.actor import ModelActor
from lmd.daemon.residency.decisions import Decision, Usage
from lmd.daemon.residency.facts import Facts, FactStore, Pool
from lmd.daemon.residency.leasing import Leases
from lmd.daemon.residency.ledger import Ledger
from lmd.daemon.residency.loading import Loader
from lmd.daemon.residency.offload import DeviceSource, FixedDevices, Offload
from lmd.daemon.residency.plans import DeviceMemory
from lmd.daemon.residency.spare import SpareRunner, SpareSettings
from lmd.daemon.residency.speeds import Speeds
from lmd.daemon.residency.standing import Standing
from lmd.daemon.residency.ticket import Ticket
from lmd.daemon.residency.values import Limits, Loadable, LoadSettings, RunnerStatus, Waiting
from lmd.daemon.residency.watching import RunnersSeen, Watchers
from lmd.daemon.runner_process import RunnerProcess
from lmd.daemon.runner_spec import RUNNER_COMMAND, RunnerSpec, RunnerTimings
from lmd.daemon.saved_kv import SavedKv
from lmd.registry.digest import Digest
from lmd.registry.errors import ModelNotFound
from lmd.runner.v1 import frames_pb2 as frames

log = structlog.get_logger(__name__)

#: How often a waiting caller is told what it waits for, at most.
WAITING_INTERVAL_S = 0.2

_GONE = Usage(busy=False, last_used=0.0, pinned=False, leaving=True)


class Residency:
    """Loads models when they are needed, keeps them while they are used, and evicts idle ones when memory is short.

    One actor for each manifest; a load, drain or failure of one never delays another, except for memory that both
    need. Use it from the event loop only. *device_source* tells what there is to load on, instead of *read_devices*.
    *on_released* is called with a manifest's digest when its runner is gone.
    """

    def __init__(
        self,
        config: Config,
        store: FactStore,
        log_dir: Path,
        pool: Pool,
        *,
        saved_kv: SavedKv | None = None,
        read_devices: Callable[[], Sequence[Device]] = lambda: [main_memory()],
        device_source: DeviceSource | None = None,
        command: Sequence[str] = RUNNER_COMMAND,
        timings: RunnerTimings | None = None,
        limits: Limits | None = None,
        start_runner: Callable[[RunnerSpec], Awaitable[RunnerProcess]] = RunnerProcess.start,
    ) -> None:
        runtime = config.runtime
        load_s = runtime.load_timeout.total_seconds()
        self.on_released: Callable[[Digest], None] = lambda digest: None
        self._keep_alive = runtime.keep_alive
        self._num_ctx = runtime.num_ctx
        self._min_ctx = runtime.min_ctx
        self._kv_type = runtime.kv_type
        self._limits = limits or Limits(
            max_queue=runtime.max_queue,
            slots=runtime.slots,
            wait_s=load_s,
            drain_s=runtime.drain_timeout.total_seconds(),
        )
        self._views_dir = config.dirs.runtime / "runners"
        self._pool = pool
        self._actors: dict[str, ModelActor] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._pins: dict[str, Mapping[str, object]] = {}
        self._watchers = Watchers(self.list, over=self._drained)

        self._offload = offload = Offload(device_source or FixedDevices(read_devices), pool, runtime.require_gpu)

        async def read() -> list[DeviceMemory]:
            # First: what programs take in between is then missing twice, and not there twice.
            await self.leases.look()
            return await offload.devices()

        async def rated(device: str) -> int:
            return await pool.run(rated_bandwidth, await offload.bus_id(device))

        self._ledger = Ledger(
            read_devices=read,
            reserve_bytes=runtime.memory_reserve_bytes,
            usage=self._usage,
            evict=self._evict,
            yield_turn=self._yield_turn,
            keep_turn=self._keep_turn,
        )
        #: How fast answers come on this machine.
        self.speeds = Speeds(store, pool, rated)
        #: Memory that programs hold which are not ours.
        self.leases = Leases(ledger=self._ledger, read_devices=read, pool=pool, bus_id_of=offload.bus_id)
        timings = timings or RunnerTimings(load_stall_s=load_s)
        self._spare = SpareRunner(
            SpareSettings(
                command=command,
                timings=timings,
                views_dir=self._views_dir,
                log_dir=log_dir,
                reserve_bytes=runtime.memory_reserve_bytes,
            ),
            read,
            start_runner,
        )
        #: What loads models, and tells what they take.
        self.loader = Loader(
            ledger=self._ledger,
            facts=Facts(store, pool, self._limits.slots),
            read_devices=read,
            slots=self._limits.slots,
            wait_s=self._limits.wait_s,
            views_dir=self._views_dir,
            log_dir=log_dir,
            command=command,
            timings=timings,
            saved_kv=saved_kv,
            kv_ram_bytes=runtime.kv_ram_bytes,
            offload=offload,
            start=self._spare.start if runtime.spare_runner else start_runner,
        )

    async def start(self) -> None:
        """Remove what a daemon that was killed left of its runners' views."""
        await self._pool.run(shutil.rmtree, self._views_dir, ignore_errors=True)

    def drain(self) -> None:
        """Take no new requests, refuse those that wait, and let running answers finish until the drain deadline."""
        if not self._closing:
            self._closing = True
            self.leases.drain()
            self._watchers.note_traffic()
            for actor in list(self._actors.values()):
                actor.close()

    def cut(self) -> None:
        """Drain, and end the answers that run now with DRAINING."""
        self.drain()
        for actor in list(self._actors.values()):
            actor.cut()

    async def stop(self) -> None:
        """Drain, and return when every runner has ended."""
        self.drain()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._spare.stop()
        await self.speeds.stop()

    def note_answer(self, model: Loadable, finished: frames.Finished) -> None:
        """Learn from an answer how fast this machine is. Others may have run beside it; a draft or choices may not."""
        actor = self._actors.get(str(model.manifest_digest))
        if actor is None or actor.loaded is None or finished.drafted_tokens or finished.choices:
            return
        self.speeds.note_soon(
            model.manifest_digest,
            actor.loaded.placement,
            actor.loaded.active_bytes,
            # The time runs from the first token on.
            tokens=finished.generated_tokens - 1,
            duration_ns=finished.generate_ns,
        )

    def resident_manifests(self) -> set[Digest]:
        """Return the manifests whose blobs are in use, or will be in a moment; safe from any thread."""
        return {actor.model.manifest_digest for actor in list(self._actors.values()) if actor.resident}

    def tally(self, *, leases: bool) -> dict[str, tuple[int, int]]:
        """Return the bytes that models, or leases, hold of each device, and how many of them its readings show."""
        return self._ledger.tally(leases=leases)

    def waiting_plans(self) -> Sequence[Decision]:
        """Return what waits for memory now, in the order in which it is served."""
        return self._ledger.waiting()

    def recent_plans(self) -> Sequence[Decision]:
        """Return what was decided last, latest first."""
        return self._ledger.recent()

    def list(self) -> list[RunnerStatus]:
        """Return all runners, longest resident first."""
        listed = [self._with_fault(actor.status()) for actor in self._actors.values()]
        return sorted(listed, key=lambda status: status.load_started_at)

    def enqueue(
        self,
        model: Loadable,
        settings: LoadSettings,
        keep_alive: timedelta | None = None,
        *,
        caller: str = "",
        again: bool = False,
        batch: bool = False,
    ) -> Ticket:
        """Give a request a place in the queue of its model, which is loaded if it has to be.

        Use the ticket as a context manager: the place, and later the hold on the runner, last as long as the block.
        *keep_alive* is how long the caller wants the model to stay after its last use; negative for ever, None for
        what it asked for before. *caller* is whose request it is: one caller may fill three quarters of the queue.
        *again* says that it had a place before, and lost it without a fault of its own: there is one for it. *batch*
        says that it can wait while others want the memory.

        Raises:
            Draining, QueueFull: no more requests are taken.
            ModelIncompatible, TemplateFailed: the engine has refused the model a moment ago.
        """
        return self._actor(model, again=again).enqueue(settings, keep_alive, caller, again=again, batch=batch)

    async def load(
        self,
        model: Loadable,
        parameters: Mapping[str, object],
        keep_alive: timedelta | None = None,
        *,
        caller: str = "",
    ) -> AsyncGenerator[Waiting | RunnerStatus, None]:
        """Make a model resident: yield what it waits for, and last the ready runner. Closing does not undo the load.

        *parameters* are those of the request; of all settings the load-time ones count.

        Raises:
            InvalidRequest: a parameter is unknown or out of range.
            LmdError: as `enqueue`, and what the load ends with.
        """
        settings = self.settings(model, parameters)
        actor = self._actor(model)
        with actor.enqueue(settings, keep_alive, caller) as ticket:
            actor.preload(settings)
            shown: Waiting | None = None
            while not await ticket.wait(WAITING_INTERVAL_S if shown is not None else 0):
                if (waiting := ticket.status()) != shown:
                    shown = waiting
                    yield waiting
            ticket.raise_refusal()
            status = actor.status()
        yield status

    def pin(self, model: Loadable, parameters: Mapping[str, object]) -> None:
        """Keep what *model*'s name means in memory from its next load on; nothing is loaded by this.

        Raises:
            InvalidRequest: a parameter is unknown or out of range.
        """
        settings = self.settings(model, parameters)
        self._pins[model.name] = parameters
        for actor in self._actors.values():
            if model.name in actor.names:
                actor.pin = settings

    def unpin(self, name: str) -> None:
        """Let the model of *name* go like any other. Idempotent."""
        self._pins.pop(name, None)
        for actor in self._actors.values():
            if name in actor.names and not any(other in self._pins for other in actor.names):
                actor.pin = None

    def watch(self) -> AsyncGenerator[RunnersSeen, None]:
        """Yield all runners at once, and again after each change, until the daemon has drained."""
        return self._watchers.watch()

    async def unload(self, name_or_digest: str, *, force: bool, save_kv: bool = True) -> int:
        """Unload a model, and return how many answers were running.

        Without *force* they finish first, and this does not wait for them; with it, or when none are running, the
        runner is gone afterwards. KV is saved unless *force* or not *save_kv*.

        Raises:
            ModelNotFound: it is not resident.
        """
        wanted = name_or_digest.lower()
        for actor in self._actors.values():
            names = {name.lower() for name in actor.names}
            if actor.resident and (wanted == actor.key or wanted in names):
                running = actor.unload(force=force, save_kv=save_kv)
                if force or not running:
                    await actor.released()
                return running
        raise ModelNotFound(
            name_or_digest, message=f"model `{name_or_digest}` is not in memory", hint="`lm ps` shows what is"
        )

    async def unload_if_resident(self, manifest: Digest) -> None:
        """Unload a model whose last name is gone, as `unload` without *force* does; others are no error.

        Nothing is saved of it: nobody can load it again.
        """
        with contextlib.suppress(ModelNotFound):
            await self.unload(str(manifest), force=False, save_kv=False)

    def _actor(self, model: Loadable, *, again: bool = False) -> ModelActor:
        """Return the actor of *model*; its name then means this version, unless it is asked for *again*."""
        if self._closing:
            raise Draining
        key = str(model.manifest_digest)
        actor = self._actors.get(key)
        if actor is None:
            actor = ModelActor(
                model,
                keep_alive=self._keep_alive,
                limits=self._limits,
                ledger=self._ledger,
                loader=self.loader,
                on_released=self._note_released,
                on_end=self._note_end,
                on_change=self._note_change,
                on_traffic=self._watchers.note_traffic,
            )
            self._actors[key] = actor
            task = asyncio.create_task(actor.run(), name=f"actor-{model.manifest_digest.short}")
            self._tasks.add(task)
            task.add_done_callback(self._note_done)
        others = [other for other in self._actors.values() if other is not actor and model.name in other.names]
        if others and again:
            # It had its place under a version that has been replaced meanwhile.
            actor.names.discard(model.name)
            return actor
        for other in others:
            self._supersede(other, model.name)
        actor.names.add(model.name)
        if model.name in self._pins:
            actor.pin = self.settings(model, self._pins[model.name])
        return actor

    def settings(self, model: Loadable, parameters: Mapping[str, object]) -> LoadSettings:
        """Return what a request with these *parameters* loads a model with.

        Raises:
            InvalidRequest: a parameter is unknown or out of range.
        """
        return load_settings(
            effective(
                parameters,
                model.parameters,
                num_ctx=self._num_ctx,
                train_ctx=model.header.context_length,
                kv_type=usable_kv_type(model.header, self._kv_type),
            ),
            model.header,
            min_ctx=context_floor(parameters, model.parameters, self._min_ctx),
        )

    def _supersede(self, old: ModelActor, name: str) -> None:
        """Take *name* from the version that it meant before; unload that when it has no other name.

        Nobody can ask for it any more: idle, it would hold memory for nothing, and an unload of *name* could find it
        instead of the new one. Its answers finish first, and its KV is saved for the case that the name moves back.
        """
        old.names.discard(name)
        if not any(other in self._pins for other in old.names):
            old.pin = None
        if not old.names and old.resident:
            old.unload(force=False)

    def _drained(self) -> bool:
        return self._closing and not any(actor.answering for actor in self._actors.values())

    def _note_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: the actor has logged it

    def _note_released(self, digest: Digest) -> None:
        self.on_released(digest)

    def _note_end(self, actor: Standing) -> None:
        if self._actors.get(actor.key) is actor:
            del self._actors[actor.key]
        if actor.announced:
            self._watchers.note(actor.name, actor.model.manifest_digest, None, actor.reason)

    def _note_change(self, actor: Standing) -> None:
        self._watchers.note(actor.name, actor.model.manifest_digest, actor.state, actor.reason)

    def _with_fault(self, status: RunnerStatus) -> RunnerStatus:
        """Say of a runner whose device was lost that it is, unless there is something to say already."""
        fault = "" if status.reason else self._offload.fault_of(self._ledger.devices_of(str(status.digest)))
        return replace(status, reason=fault) if fault else status

    def _usage(self, key: str) -> Usage:
        actor = self._actors.get(key)
        return actor.usage() if actor is not None else self.leases.usage(key) or _GONE

    def _evict(self, key: str, reason: str) -> None:
        actor = self._actors.get(key)
        if actor is not None:
            actor.evict(reason)

    def _yield_turn(self, key: str, reason: str) -> None:
        actor = self._actors.get(key)
        if actor is not None:
            actor.yield_turn(reason)

    def _keep_turn(self, key: str) -> None:
        actor = self._actors.get(key)
        if actor is not None:
            actor.keep_turn()
