"""Brings a model up: spawn, memory, load, and the second try after an out-of-memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from lmd.daemon.conversations import chat_frame, conversation
from lmd.daemon.devices import CPU
from lmd.daemon.errors import DeviceGone, DeviceMemoryShort
from lmd.daemon.residency.facts import Facts, MeasuredMemory
from lmd.daemon.residency.ledger import Ledger
from lmd.daemon.residency.offload import Offload
from lmd.daemon.residency.plans import Action, Ask, DeviceMemory, Held, Need, Placement, Plan
from lmd.daemon.residency.values import MAX_PROMPT_BYTES, TEMPLATE_TIMEOUT_S, Loadable, LoadSettings
from lmd.daemon.runner_process import OutOfMemory, RunnerProcess
from lmd.daemon.runner_spec import RunnerSpec, RunnerTimings, adapter_names, draft_names, view_names
from lmd.daemon.saved_kv import SavedKv
from lmd.registry.memory import MemoryEstimate, estimate
from lmd.runner.v1 import frames_pb2 as frames

log = structlog.get_logger(__name__)

EVICT_TIMEOUT_S = 30.0

#: What is remembered of loads on one accelerator, whichever that was.
GPU = "gpu"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A runner that is ready, with the settings that were asked for and what came of them.

    *saves_kv* says that it may save KV when it leaves; *active_bytes* are the weights that a token reads; *reload_s* is
    how long the load took, less the wait for memory; *estimated_bytes* is what the headers said that it takes, with
    draft and adapters; *remark* is what is noteworthy about where it is.
    """

    runner: RunnerProcess
    settings: LoadSettings
    num_ctx: int
    memory: MeasuredMemory
    device: str
    saves_kv: bool
    reload_s: float
    placement: Placement
    active_bytes: int
    estimated_bytes: int
    remark: str = ""


class LoadFollower(Protocol):
    """Whom a load is for: it is told how the load goes, and bounds its wait for memory."""

    @property
    def waits_since(self) -> float | None:
        """When the first request for the model came, on the loop's clock: it counts for its turn."""

    @property
    def priority(self) -> int:
        """How urgently the model is wanted, now."""

    def note_phase(self, reason: str, patient: bool) -> None:
        """Note what the load waits for, and whether leaving off now loses no work."""

    def note_progress(self, fraction: float) -> None:
        """Note how much of the weights is read."""

    def wait_begins(self) -> float:
        """Note that it waits for memory from now on; return until when, on the loop's clock."""

    def wait_is_over(self, error: DeviceMemoryShort) -> float | None:
        """Refuse those whose time is up; return until when the others wait, None when nobody is left."""


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads models, each in a runner of its own. Cancelling a load leaves nothing of it."""

    ledger: Ledger
    facts: Facts
    read_devices: Callable[[], Awaitable[Sequence[DeviceMemory]]]
    slots: int
    wait_s: float
    views_dir: Path
    log_dir: Path
    command: Sequence[str]
    timings: RunnerTimings
    offload: Offload
    saved_kv: SavedKv | None = None
    kv_ram_bytes: int = 0
    #: What makes a runner; it ends the process when it is cancelled.
    start: Callable[[RunnerSpec], Awaitable[RunnerProcess]] = RunnerProcess.start

    async def load(self, model: Loadable, settings: LoadSettings, follower: LoadFollower) -> Loaded:
        """Load *model*, telling *follower* how it goes.

        Raises:
            DeviceMemoryShort: the memory does not suffice, also with nobody idle left.
            DeviceUnavailable: there is no accelerator for it, and main memory is not allowed.
            RunnerError, ModelIncompatible, TemplateFailed, BlobMissing: see `RunnerProcess`.
        """
        try:
            return await self._try(model, settings, follower)
        except OutOfMemory as error:
            log.warning("load_out_of_memory", model=model.name, detail=str(error))
        follower.note_phase("makes room after running out of memory", True)
        if await self.ledger.evict_idle(str(model.manifest_digest), timeout_s=EVICT_TIMEOUT_S):
            try:
                return await self._try(model, settings, follower)
            except OutOfMemory as error:
                log.warning("load_out_of_memory_again", model=model.name, detail=str(error))
        raise await self._short(model, settings)

    async def _try(self, model: Loadable, settings: LoadSettings, follower: LoadFollower) -> Loaded:
        """Load it; when a device turns out to be gone, look what is left, and load it once more."""
        try:
            return await self._attempt(model, settings, follower)
        except DeviceGone as error:
            log.warning("load_device_gone", model=model.name, detail=error.message)
        follower.note_phase("looks which devices are left", True)
        await self.offload.look_again()
        return await self._attempt(model, settings, follower)

    async def _attempt(self, model: Loadable, settings: LoadSettings, follower: LoadFollower) -> Loaded:
        key = str(model.manifest_digest)
        follower.note_phase("starts the runner", True)
        clock = asyncio.get_running_loop().time
        started = clock()
        runner = await self.start(self._spec(model))
        try:
            hello = runner.hello.result()
            ask = await self.ask(model, settings, gpu_offload=hello.gpu_offload)
            asked = clock()
            if (since := follower.waits_since) is not None:
                ask = replace(ask, waited_s=asked - since)
            placement = await self.ledger.admit(
                ask,
                timeout_s=self.wait_s,
                until=follower.wait_begins(),
                priority=lambda: follower.priority,
                on_wait=lambda plan: follower.note_phase(_waits_for(plan), True),
                on_late=follower.wait_is_over,
            )
            if runner.exit.done():
                # It died while it waited, maybe minutes ago, and held nothing yet: that fails nobody's request.
                await runner.gone()
                runner = await self.start(self._spec(model))
            started += clock() - asked
            # What somebody wanted and did not get is kept, so that it is not tried again for the next one.
            wanted_ctx = settings.num_ctx if placement.num_ctx < settings.num_ctx else 0
            settings = replace(settings, num_ctx=placement.num_ctx, wanted_ctx=wanted_ctx)
            follower.note_phase("reads the weights", False)
            frame = await self._frame(model, settings, placement, hello.engine_version)
            gpus = [share.device for share in placement.accelerators]
            if gpus:
                runner.ask_devices = lambda: self.offload.fault_now(gpus)
            ready = await runner.load(frame, partial(_tell_progress, follower, settings.num_ctx))
            memory = MeasuredMemory(ready.weights_bytes, ready.kv_bytes, ready.compute_bytes, ready.vram_bytes)
            whole, beside_bytes = self.estimate(model, settings), _beside_bytes(model, settings)
            _compare(model, settings, ready, whole, beside_bytes)
            self.ledger.settle(key, _held(ready, placement))
            if (kind := _kind(placement, memory)) is not None:
                await self.facts.note_memory(model.manifest_digest, settings, kind, memory)
            if frame.num_thread == 0 and ready.threads_lasting:
                await self.facts.note_threads(
                    model.manifest_digest, hello.engine_version, ready.num_thread, ready.num_thread_batch
                )
            where = _where(ready, model.header.block_count)
            remark = await self.offload.remark(
                model.name,
                gpus,
                ready,
                num_gpu=settings.num_gpu,
                gpu_offload=hello.gpu_offload,
            )
            return Loaded(
                runner,
                settings,
                ready.num_ctx,
                memory,
                where,
                saves_kv=bool(frame.kv_dir),
                reload_s=clock() - started,
                placement=placement,
                active_bytes=whole.active_bytes,
                estimated_bytes=whole.total_bytes + beside_bytes,
                remark=remark,
            )
        except BaseException:
            runner.kill()
            await runner.gone()
            self.ledger.release(key)
            raise

    def _spec(self, model: Loadable) -> RunnerSpec:
        return RunnerSpec(
            name=model.name,
            weights=model.weights,
            views_dir=self.views_dir,
            log_path=self.log_dir / f"runner-{model.manifest_digest.short}.log",
            command=self.command,
            timings=self.timings,
            draft=model.draft,
            adapters=tuple(adapter.path for adapter in model.adapters),
        )

    async def ask(self, model: Loadable, settings: LoadSettings, *, gpu_offload: bool) -> Ask:
        """Return what the model takes, with each context that will do, and where it may go."""
        needs = [await self.need(model, replace(settings, num_ctx=num_ctx)) for num_ctx in settings.contexts()]
        devices = await self.offload.allowed(model.name, num_gpu=settings.num_gpu, gpu_offload=gpu_offload)
        key = str(model.manifest_digest)
        return Ask(key, model.name, tuple(needs), num_gpu=settings.num_gpu, devices=devices)

    async def need(self, model: Loadable, settings: LoadSettings) -> Need:
        """Return what the model takes by its header, and where it is known, what it took the last time."""
        whole = self.estimate(model, settings)
        parked_bytes = self._parked(whole.kv_bytes)
        beside_bytes = _beside_bytes(model, settings)
        need = Need.of(settings.num_ctx, whole, beside_bytes=beside_bytes, parked_bytes=parked_bytes)
        if (on_cpu := await self.facts.memory(model.manifest_digest, settings, CPU)) is not None:
            parked_bytes = self._parked(on_cpu.kv_bytes)
            need = replace(need, cpu_bytes=on_cpu.total_bytes + parked_bytes)
        if (on_gpu := await self.facts.memory(model.manifest_digest, settings, GPU)) is not None:
            host_bytes = on_gpu.total_bytes - on_gpu.vram_bytes + self._parked(on_gpu.kv_bytes)
            need = replace(need, gpu_bytes=on_gpu.vram_bytes, host_bytes=host_bytes)
        return need

    def estimate(self, model: Loadable, settings: LoadSettings) -> MemoryEstimate:
        """Return what the model takes by its header, without draft and adapters."""
        return estimate(
            model.header,
            num_ctx=settings.num_ctx,
            slots=self.slots,
            num_batch=settings.num_batch,
            kv_type=settings.kv_type,
        )

    def _parked(self, kv_bytes: int) -> int:
        """Return what prefixes may take beside the context's memory of *kv_bytes*."""
        return min(self.kv_ram_bytes, kv_bytes)

    async def _frame(self, model: Loadable, settings: LoadSettings, placement: Placement, engine: str) -> frames.Load:
        kv_dir = await self._kv_dir(model, settings, placement, engine)
        measured = await self.facts.threads(model.manifest_digest, engine)
        return frames.Load(
            model_paths=view_names(len(model.weights)),
            draft_paths=draft_names(len(model.draft)),
            adapters=[
                frames.Adapter(path=path, scale=adapter.scale)
                for path, adapter in zip(adapter_names(len(model.adapters)), model.adapters, strict=True)
            ],
            num_ctx=settings.num_ctx,
            slots=self.slots,
            num_batch=settings.num_batch,
            num_gpu=-1 if placement.is_whole else placement.gpu_layers,
            devices=await self.offload.parts({share.device: share.layers for share in placement.accelerators}),
            num_thread=settings.num_thread or measured[0],
            num_thread_batch=0 if settings.num_thread else measured[1],
            use_mmap=settings.use_mmap,
            template=model.template or "",
            max_prompt_bytes=MAX_PROMPT_BYTES,
            template_timeout_s=TEMPLATE_TIMEOUT_S,
            manifest_chat=_manifest_chat(model),
            kv_ram_bytes=self.kv_ram_bytes,
            kv_dir=str(kv_dir or ""),
            kv_type=settings.kv_type,
            kv_dir_bytes=self.saved_kv.quota_bytes if self.saved_kv is not None and kv_dir is not None else 0,
        )

    async def _kv_dir(self, model: Loadable, settings: LoadSettings, placement: Placement, engine: str) -> Path | None:
        if self.saved_kv is None:
            return None
        # What a state depends on; the runner checks more closely what is in its files.
        kind = GPU if placement.accelerators else CPU
        key = f"ctx{settings.num_ctx}-slots{self.slots}-{kind}-{settings.kv_type}"
        return await self.saved_kv.prepare(model.manifest_digest, engine, key)

    async def _short(self, model: Loadable, settings: LoadSettings) -> DeviceMemoryShort:
        devices = await self.read_devices()
        return DeviceMemoryShort(
            model.name,
            needed_bytes=(await self.need(model, settings)).cpu_bytes,
            free_bytes=max(device.free_bytes for device in devices),
            device=", ".join(device.id for device in devices),
        )


def _tell_progress(follower: LoadFollower, num_ctx: int, fraction: float) -> None:
    """Tell how much is read; after that the context is made, which takes long where it is large."""
    follower.note_progress(fraction)
    if fraction >= 1:
        follower.note_phase(f"makes room for a context of {num_ctx} tokens", False)


def _manifest_chat(model: Loadable) -> frames.Chat | None:
    """Return what every chat of the model begins with, or None when there is no such thing."""
    turns = conversation(model.system, model.messages)
    return chat_frame(turns) if model.template and turns else None


def _compare(
    model: Loadable, settings: LoadSettings, ready: frames.Ready, whole: MemoryEstimate, beside_bytes: int
) -> None:
    """Log what the header promised and what the engine took: what is remembered of it replaces the former."""
    log.info(
        "memory_measured",
        model=model.name,
        num_ctx=settings.num_ctx,
        kv_type=settings.kv_type,
        weights_bytes=ready.weights_bytes,
        kv_bytes=ready.kv_bytes,
        compute_bytes=ready.compute_bytes,
        estimated_weights_bytes=whole.weights_bytes + beside_bytes,
        estimated_kv_bytes=whole.kv_bytes,
        estimated_compute_bytes=whole.compute_bytes,
        devices={part.device: part.weights_bytes + part.kv_bytes + part.compute_bytes for part in ready.device_bytes},
    )


def _beside_bytes(model: Loadable, settings: LoadSettings) -> int:
    """Return what the model that drafts and the adapters take beside the model."""
    adapters_bytes = sum(adapter.size_bytes for adapter in model.adapters)
    if model.draft_header is None:
        return adapters_bytes
    own = settings.within(model.draft_header.context_length)
    draft = estimate(model.draft_header, num_ctx=own.num_ctx, slots=1, num_batch=own.num_batch, drafts=True)
    return adapters_bytes + draft.total_bytes


def _waits_for(plan: Plan) -> str:
    return plan.reason if plan.action is not Action.REFUSE else f"waits for memory: {plan.reason}"


def _kind(placement: Placement, memory: MeasuredMemory) -> str | None:
    """Return what the bytes of a load are remembered as; None when it was divided in a way that may not come again."""
    if not placement.accelerators:
        return CPU
    return GPU if placement.is_whole and len(placement.accelerators) == 1 and memory.vram_bytes > 0 else None


def _held(ready: frames.Ready, placement: Placement) -> list[Held]:
    """Return what a loaded model holds of each device, and what of that a reading of the device does not show."""
    if ready.device_bytes:
        parts = [(part.device, part.weights_bytes, part.kv_bytes + part.compute_bytes) for part in ready.device_bytes]
    else:
        # The runner tells the sum of all accelerators: each has its part of it.
        planned_bytes = sum(share.bytes for share in placement.accelerators)
        parts = [
            (share.device, 0, ready.vram_bytes * share.bytes // planned_bytes)
            for share in placement.accelerators
            if planned_bytes
        ]
        host_bytes = ready.weights_bytes + ready.kv_bytes + ready.compute_bytes - ready.vram_bytes
        host_weights_bytes = min(ready.weights_bytes, host_bytes)
        parts.append((CPU, host_weights_bytes, host_bytes - host_weights_bytes))
    held = [Held(device, weights + other) for device, weights, other in parts if device != CPU and weights + other]
    weights_bytes = sum(weights for device, weights, _ in parts if device == CPU)
    other_bytes = sum(other for device, _, other in parts if device == CPU)
    # Mapped weights count as cache, which the kernel calls available; what was copied out of them does not.
    unseen_bytes = ready.mapped_bytes + ready.parked_bytes
    if host := weights_bytes + other_bytes + ready.parked_bytes:
        held.append(Held(CPU, host, unseen_bytes))
    return held


def _where(ready: frames.Ready, block_count: int) -> str:
    """Say where a model computes; all layers and the output layer on an accelerator is "gpu"."""
    if ready.vram_bytes == 0:
        return "cpu"
    return "gpu" if ready.gpu_layers > block_count else "gpu+cpu"
