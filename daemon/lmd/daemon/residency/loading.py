"""Brings a model up: spawn, memory, load, and the second try after an out-of-memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from lmd.daemon.conversations import chat_frame, conversation
from lmd.daemon.devices import CPU
from lmd.daemon.errors import DeviceMemoryShort
from lmd.daemon.residency.facts import Facts, MeasuredMemory
from lmd.daemon.residency.ledger import Ledger, Option
from lmd.daemon.residency.offload import Offload
from lmd.daemon.residency.planner import DeviceMemory
from lmd.daemon.residency.values import MAX_PROMPT_BYTES, TEMPLATE_TIMEOUT_S, Loadable, LoadSettings
from lmd.daemon.runner_process import OutOfMemory, RunnerProcess
from lmd.daemon.runner_spec import RunnerSpec, RunnerTimings, adapter_names, draft_names, view_names
from lmd.daemon.saved_kv import SavedKv
from lmd.registry.memory import estimate
from lmd.runner.v1 import frames_pb2 as frames

log = structlog.get_logger(__name__)

EVICT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A runner that is ready, with the settings that were asked for and what came of them.

    *saves_kv* says that it may save KV when it leaves, *remark* what is noteworthy about where it is.
    """

    runner: RunnerProcess
    settings: LoadSettings
    num_ctx: int
    memory: MeasuredMemory
    device: str
    saves_kv: bool
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads models, each in a runner of its own. Cancelling a load leaves nothing of it."""

    ledger: Ledger
    facts: Facts
    read_devices: Callable[[], Awaitable[Sequence[DeviceMemory]]]
    name_of: Callable[[str], str]
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

    async def load(
        self,
        model: Loadable,
        settings: LoadSettings,
        *,
        on_phase: Callable[[str, bool], None],
        on_progress: Callable[[float], None],
    ) -> Loaded:
        """Load *model*; *on_phase* gets what it waits for, and whether leaving off now loses no work.

        Raises:
            DeviceMemoryShort: the memory does not suffice, also with nobody idle left.
            RunnerError, ModelIncompatible, TemplateFailed, BlobMissing: see `RunnerProcess`.
        """
        try:
            return await self._try(model, settings, on_phase, on_progress)
        except OutOfMemory as error:
            log.warning("load_out_of_memory", model=model.name, detail=str(error))
        on_phase("makes room after running out of memory", True)
        if await self.ledger.evict_idle(str(model.manifest_digest), timeout_s=EVICT_TIMEOUT_S):
            try:
                return await self._try(model, settings, on_phase, on_progress)
            except OutOfMemory as error:
                log.warning("load_out_of_memory_again", model=model.name, detail=str(error))
        raise await self._short(model, settings)

    async def _try(
        self,
        model: Loadable,
        settings: LoadSettings,
        on_phase: Callable[[str, bool], None],
        on_progress: Callable[[float], None],
    ) -> Loaded:
        key = str(model.manifest_digest)
        on_phase("starts the runner", True)
        runner = await self.start(self._spec(model))
        try:
            hello = runner.hello.result()
            options = await self._options(model, settings, gpu_offload=hello.gpu_offload)
            device = await self.ledger.admit(
                key,
                model.name,
                options,
                timeout_s=self.wait_s,
                on_wait=lambda holders: on_phase(self._waits_for(holders), True),
            )
            on_phase("reads the weights", False)
            frame = await self._frame(model, settings, device, hello.engine_version)
            ready = await runner.load(frame, on_progress)
            memory = MeasuredMemory(ready.weights_bytes, ready.kv_bytes, ready.compute_bytes, ready.vram_bytes)
            if device == CPU:
                mapped_bytes = memory.weights_bytes if settings.use_mmap else 0
                self.ledger.settle(
                    key,
                    held_bytes=memory.total_bytes + ready.parked_bytes,
                    unseen_bytes=mapped_bytes + ready.parked_bytes,
                )
            else:
                self.ledger.settle(key, held_bytes=memory.vram_bytes, unseen_bytes=0)
            await self.facts.note_memory(model.manifest_digest, settings, _kind(device), memory)
            if frame.num_thread == 0 and ready.threads_lasting:
                await self.facts.note_threads(
                    model.manifest_digest, hello.engine_version, ready.num_thread, ready.num_thread_batch
                )
            where = _where(ready, model.header.block_count)
            remark = await self.offload.remark(
                model.name, [device], ready, num_gpu=settings.num_gpu, gpu_offload=hello.gpu_offload
            )
            return Loaded(runner, settings, ready.num_ctx, memory, where, saves_kv=bool(frame.kv_dir), remark=remark)
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

    async def _options(self, model: Loadable, settings: LoadSettings, *, gpu_offload: bool) -> list[Option]:
        """Return where the model may go, best first: accelerators when the engine can use them, then the CPU."""
        allowed = await self.offload.allowed(model.name, num_gpu=settings.num_gpu, gpu_offload=gpu_offload)
        options = []
        if gpus := tuple(device for device in allowed if device != CPU):
            options.append(Option(gpus, await self._needed_bytes(model, settings, "gpu")))
        if CPU in allowed:
            options.append(Option((CPU,), await self._needed_bytes(model, settings, CPU)))
        return options

    async def _needed_bytes(self, model: Loadable, settings: LoadSettings, kind: str) -> int:
        """Return what the model took there the last time, or else an estimate from its header."""
        measured = await self.facts.memory(model.manifest_digest, settings, kind)
        if measured is not None:
            return measured.total_bytes + self._parked(measured.kv_bytes) if kind == CPU else measured.vram_bytes
        whole = estimate(model.header, num_ctx=settings.num_ctx, slots=self.slots, num_batch=settings.num_batch)
        beside_bytes = _draft_bytes(model, settings) + sum(adapter.size_bytes for adapter in model.adapters)
        if kind == CPU:
            return whole.total_bytes + self._parked(whole.kv_bytes) + beside_bytes
        if settings.num_gpu == -1:
            return whole.total_bytes + beside_bytes
        # The engine counts the output layer as one more. A draft is never split: it must be fast to be of use.
        layers = model.header.block_count + 1
        return whole.total_bytes * min(settings.num_gpu, layers) // layers + beside_bytes

    def _parked(self, kv_bytes: int) -> int:
        """Return what prefixes may take beside the context's memory of *kv_bytes*."""
        return min(self.kv_ram_bytes, kv_bytes)

    async def _frame(self, model: Loadable, settings: LoadSettings, device: str, engine: str) -> frames.Load:
        kv_dir = await self._kv_dir(model, settings, device, engine)
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
            num_gpu=0 if device == CPU else settings.num_gpu,
            devices=await self.offload.parts({device: 1.0}),
            num_thread=settings.num_thread or measured[0],
            num_thread_batch=0 if settings.num_thread else measured[1],
            use_mmap=settings.use_mmap,
            template=model.template or "",
            max_prompt_bytes=MAX_PROMPT_BYTES,
            template_timeout_s=TEMPLATE_TIMEOUT_S,
            manifest_chat=_manifest_chat(model),
            kv_ram_bytes=self.kv_ram_bytes,
            kv_dir=str(kv_dir or ""),
            kv_dir_bytes=self.saved_kv.quota_bytes if self.saved_kv is not None and kv_dir is not None else 0,
        )

    async def _kv_dir(self, model: Loadable, settings: LoadSettings, device: str, engine: str) -> Path | None:
        if self.saved_kv is None:
            return None
        # What a state depends on; the runner checks more closely what is in its files.
        key = f"ctx{settings.num_ctx}-slots{self.slots}-{_kind(device)}"
        return await self.saved_kv.prepare(model.manifest_digest, engine, key)

    async def _short(self, model: Loadable, settings: LoadSettings) -> DeviceMemoryShort:
        devices = await self.read_devices()
        return DeviceMemoryShort(
            model.name,
            needed_bytes=await self._needed_bytes(model, settings, CPU),
            free_bytes=max(device.free_bytes for device in devices),
            device=", ".join(device.id for device in devices),
        )

    def _waits_for(self, holders: tuple[str, ...]) -> str:
        names = " and ".join(f"`{self.name_of(holder)}`" for holder in holders)
        return f"waits for memory that {names} holds" if names else "waits for memory"


def _manifest_chat(model: Loadable) -> frames.Chat | None:
    """Return what every chat of the model begins with, or None when there is no such thing."""
    turns = conversation(model.system, model.messages)
    return chat_frame(turns) if model.template and turns else None


def _draft_bytes(model: Loadable, settings: LoadSettings) -> int:
    """Estimate the memory of the model that drafts: it has one sequence, whatever the slots."""
    if model.draft_header is None:
        return 0
    own = settings.within(model.draft_header.context_length)
    return estimate(model.draft_header, num_ctx=own.num_ctx, slots=1, num_batch=own.num_batch).total_bytes


def _kind(device: str) -> str:
    return CPU if device == CPU else "gpu"


def _where(ready: frames.Ready, block_count: int) -> str:
    """Say where a model computes; all layers and the output layer on an accelerator is "gpu"."""
    if ready.vram_bytes == 0:
        return "cpu"
    return "gpu" if ready.gpu_layers > block_count else "gpu+cpu"
