"""Whether a model fits: before it is loaded, or even pulled, and without a trace.

It rests on the same facts and the same planner as a load; only nobody leaves, and nothing is entered. Of a model that
is not in the store the header alone is fetched.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lmd.daemon.access import pull_ref
from lmd.daemon.adapter_scales import AdapterFile
from lmd.daemon.blocking import BlockingPool
from lmd.daemon.callers import Caller
from lmd.daemon.errors import DeviceUnavailable
from lmd.daemon.residency.decisions import Picture
from lmd.daemon.residency.facts import MeasuredMemory
from lmd.daemon.residency.loading import Loader
from lmd.daemon.residency.plans import CPU, Action, Ask, Placement, Plan
from lmd.daemon.residency.residency import Residency
from lmd.daemon.residency.speeds import Expected, Speeds, parts_of, place_name
from lmd.daemon.residency.values import Loadable, LoadSettings, RunnerState
from lmd.registry.digest import Digest
from lmd.registry.errors import ModelNotFound
from lmd.registry.gguf import GgufHeader
from lmd.registry.lm_config import Message
from lmd.registry.parameters import ParameterValue
from lmd.registry.peek import PeekedModel
from lmd.registry.ref import ModelRef

#: Contexts are tried in steps of this many tokens.
CONTEXT_STEP = 256
#: The largest context that is tried of a model that does not say what it was trained with.
MAX_CONTEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a model fits, and what it takes; see `FitModelResponse` of the API."""

    total_bytes: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    beside_bytes: int
    fits: bool
    measured: bool
    shares: tuple[tuple[str, int], ...]
    gpu_layers: int
    layers: int
    evicted: tuple[str, ...]
    context_length: int
    largest_context_length: int
    trained_context_length: int
    slots: int
    tokens_per_second: float
    active_bytes: int
    calibrated: bool
    stored: bool
    download_bytes: int
    reason: str


class Peeker(Protocol):
    """Reads the headers of models where they are, in the calling thread."""

    def peek(self, ref: ModelRef, *, token: str | None, cancelled: threading.Event) -> PeekedModel:
        """Return what the source says of a model; nothing comes into the store."""


class Models(Protocol):
    """The part of the catalog that is needed here."""

    async def resolve(self, text: str) -> Loadable:
        """Return the model that a reference means, with all its files."""


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """A model that is not in the store, as far as its memory is concerned."""

    name: str
    header: GgufHeader
    parameters: Mapping[str, ParameterValue]
    weights: tuple[Path, ...] = ()
    draft: tuple[Path, ...] = ()
    draft_header: GgufHeader | None = None
    adapters: Sequence[AdapterFile] = ()
    template: str | None = None
    system: str | None = None
    messages: Sequence[Message] = ()

    @property
    def manifest_digest(self) -> Digest:
        """A digest that no manifest has: nothing was ever measured of it."""
        return Digest.of(f"not in the store: {self.name}".encode())


class Fitting:
    """Answers whether models fit. The pool is its own: a source that is slow keeps nobody else waiting."""

    def __init__(self, models: Models, peeker: Peeker, residency: Residency, pool: BlockingPool) -> None:
        self._models = models
        self._peeker = peeker
        self._residency = residency
        self._pool = pool

    @property
    def _loader(self) -> Loader:
        return self._residency.loader

    @property
    def _speeds(self) -> Speeds:
        return self._residency.speeds

    async def fit(
        self, name: str, parameters: Mapping[str, object], *, caller: Caller, token: str | None = None
    ) -> Fit:
        """Tell whether a model fits with these parameters of a request. Cancelling it leaves the source.

        Raises:
            InvalidRef, InvalidRequest: the reference or a parameter is not legal.
            ModelNotFound, SourceError, DigestMismatch: it is not in the store, and nowhere else either.
            UploadRequired: it is a file, which the daemon may not open for this caller.
            GgufInvalid, BlobMissing, FileInvalid: it cannot be read.
        """
        download_bytes = 0
        model: Loadable
        try:
            model, stored = await self._models.resolve(name), True
        except ModelNotFound:
            ref = pull_ref(name, caller)
            cancelled = threading.Event()
            peeked = await self._pool.run_cancellable(
                cancelled, self._peeker.peek, ref, token=token, cancelled=cancelled
            )
            model, stored = _Elsewhere(peeked.name, peeked.header, peeked.parameters), False
            download_bytes = peeked.download_bytes
        wanted = self._residency.settings(model, parameters)
        settings = wanted.within(model.header.context_length)
        found = await self._look(model, settings, stored=stored)
        reason = found.reason
        if settings.num_ctx < wanted.num_ctx:
            reason += f"; with a context of {settings.num_ctx} tokens: it was trained with no more"
        return replace(found, stored=stored, download_bytes=download_bytes, reason=reason)

    async def _look(self, model: Loadable, settings: LoadSettings, *, stored: bool) -> Fit:
        loader = self._loader
        try:
            ask = await loader.ask(model, settings, gpu_offload=True)
        except DeviceUnavailable as error:
            return self._nowhere(model, settings, error)
        picture = await loader.ledger.picture(ask.key)
        plan = picture.plan(ask)
        placement = plan.placement
        fits = plan.action is not Action.REFUSE
        taken = replace(settings, num_ctx=placement.num_ctx)
        whole = loader.estimate(model, taken)
        measured = await self._measured(model, taken, placement)
        kinds = measured or MeasuredMemory(whole.weights_bytes, whole.kv_bytes, whole.compute_bytes, 0)
        # Of an accelerator's model the engine copies what input and output share: more than the kinds add up to.
        beside_bytes = max(0, placement.total_bytes - kinds.total_bytes)
        speed = await self._expected(model, placement, whole.active_bytes, stored=stored)
        return Fit(
            total_bytes=kinds.total_bytes + beside_bytes,
            weights_bytes=kinds.weights_bytes,
            kv_bytes=kinds.kv_bytes,
            compute_bytes=kinds.compute_bytes,
            beside_bytes=beside_bytes,
            fits=fits,
            measured=measured is not None,
            shares=tuple((share.device, share.bytes) for share in placement.shares),
            gpu_layers=placement.gpu_layers,
            layers=len(whole.layers) + 1,
            evicted=picture.names(plan.others) if plan.action in (Action.EVICT, Action.TURN) else (),
            context_length=settings.num_ctx,
            largest_context_length=await self._largest_context(model, settings, plan, picture, ask),
            trained_context_length=model.header.context_length,
            slots=loader.slots,
            tokens_per_second=speed.tokens_per_second if fits else 0.0,
            active_bytes=whole.active_bytes,
            calibrated=speed.calibrated and fits,
            stored=stored,
            download_bytes=0,
            reason=self._reason(model, settings, plan, ask),
        )

    def _nowhere(self, model: Loadable, settings: LoadSettings, error: DeviceUnavailable) -> Fit:
        """Return what a model takes that may not be loaded on any device of this machine."""
        whole = self._loader.estimate(model, settings)
        return Fit(
            total_bytes=whole.total_bytes,
            weights_bytes=whole.weights_bytes,
            kv_bytes=whole.kv_bytes,
            compute_bytes=whole.compute_bytes,
            beside_bytes=0,
            fits=False,
            measured=False,
            shares=(),
            gpu_layers=0,
            layers=len(whole.layers) + 1,
            evicted=(),
            context_length=settings.num_ctx,
            largest_context_length=0,
            trained_context_length=model.header.context_length,
            slots=self._loader.slots,
            tokens_per_second=0.0,
            active_bytes=whole.active_bytes,
            calibrated=False,
            stored=True,
            download_bytes=0,
            reason=error.message,
        )

    async def _measured(self, model: Loadable, settings: LoadSettings, placement: Placement) -> MeasuredMemory | None:
        """Return what the model took in this place the last time."""
        if placement.accelerators and not (placement.is_whole and len(placement.accelerators) == 1):
            return None
        kind = "gpu" if placement.accelerators else CPU
        return await self._loader.facts.memory(model.manifest_digest, settings, kind)

    async def _expected(self, model: Loadable, placement: Placement, active_bytes: int, *, stored: bool) -> Expected:
        digest = model.manifest_digest if stored else None
        return await self._speeds.expect(digest, place_name(placement), parts_of(placement, active_bytes))

    async def _largest_context(
        self, model: Loadable, settings: LoadSettings, plan: Plan, picture: Picture, ask: Ask
    ) -> int:
        """Return the largest context that fits with as many layers on accelerators as the one that was asked for."""
        gpu_layers = plan.placement.gpu_layers if plan.action is not Action.REFUSE else 0

        async def fits(num_ctx: int) -> bool:
            need = await self._loader.need(model, replace(settings, num_ctx=num_ctx, min_ctx=0))
            planned = picture.plan(replace(ask, needs=(need,)))
            return planned.action is not Action.REFUSE and planned.placement.gpu_layers >= gpu_layers

        trained = model.header.context_length or MAX_CONTEXT
        if await fits(trained):
            return trained
        low, high = 0, -(-trained // CONTEXT_STEP)
        while high - low > 1:
            middle = (low + high) // 2
            if await fits(middle * CONTEXT_STEP):
                low = middle
            else:
                high = middle
        return low * CONTEXT_STEP

    def _reason(self, model: Loadable, settings: LoadSettings, plan: Plan, ask: Ask) -> str:
        for status in self._residency.list():
            if status.digest == model.manifest_digest and status.state is RunnerState.READY:
                if settings.num_ctx <= status.context_length:
                    return f"is in memory already, on {status.device}"
                if plan.action is not Action.REFUSE:
                    return f"loads again with these settings: {plan.reason}"
        return plan.reason
