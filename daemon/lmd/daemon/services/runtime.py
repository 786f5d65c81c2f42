"""RuntimeService: translates messages; the behaviour is in `lmd.daemon.residency`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from datetime import timedelta
from typing import Protocol

import grpc.aio

from lmd.daemon.residency.pins import Pins
from lmd.daemon.residency.residency import Residency
from lmd.daemon.residency.values import Loadable, RunnerState, RunnerStatus, Waiting
from lmd.daemon.residency.watching import RunnerChange
from lmd.daemon.services.answers import duration, load_progress
from lmd.daemon.services.inference import cache_scope_of, keep_alive_of, requested
from lmd.daemon.unloading import unload_model
from lmd.registry.store import TagRecord
from lmd.v1 import runtime_service_pb2 as pb
from lmd.v1 import runtime_service_pb2_grpc as rpc

_STATES = {
    RunnerState.LOADING: pb.Runner.STATE_LOADING,
    RunnerState.READY: pb.Runner.STATE_READY,
    RunnerState.DRAINING: pb.Runner.STATE_DRAINING,
    RunnerState.FAILED: pb.Runner.STATE_FAILED,
}


class Models(Protocol):
    """The part of the catalog that is needed here."""

    async def find(self, text: str) -> TagRecord:
        """Return the tag that a reference means."""

    async def resolve(self, text: str) -> Loadable:
        """Return the model that a reference means, with all its files."""


class RuntimeServiceServicer(rpc.RuntimeServiceServicer):
    """Shows and steers the runners."""

    def __init__(self, catalog: Models, residency: Residency, pins: Pins) -> None:
        self._catalog = catalog
        self._residency = residency
        self._pins = pins

    async def ListRunners(
        self,
        request: pb.ListRunnersRequest,
        context: grpc.aio.ServicerContext[pb.ListRunnersRequest, pb.ListRunnersResponse],
    ) -> pb.ListRunnersResponse:
        """Return the runners."""
        return pb.ListRunnersResponse(runners=[runner_message(status) for status in self._residency.list()])

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: grpc.aio.ServicerContext[pb.LoadModelRequest, pb.LoadModelResponse]
    ) -> AsyncIterator[pb.LoadModelResponse]:
        """Load a model, and tell how it goes."""
        model = await self._catalog.resolve(request.name)
        events = self._residency.load(
            model, requested(request.parameters), keep_alive_of(request), caller=cache_scope_of(context)
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Waiting):
                    yield pb.LoadModelResponse(progress=load_progress(event))
                else:
                    yield pb.LoadModelResponse(runner=runner_message(event))

    async def UnloadModel(
        self,
        request: pb.UnloadModelRequest,
        context: grpc.aio.ServicerContext[pb.UnloadModelRequest, pb.UnloadModelResponse],
    ) -> pb.UnloadModelResponse:
        """Unload a model; it need not be in the store any more."""
        stopped = await unload_model(self._catalog, self._residency, request.name, force=request.force)
        return pb.UnloadModelResponse(name=stopped.name, running_answers=stopped.running_answers)

    async def WatchRunners(
        self,
        request: pb.WatchRunnersRequest,
        context: grpc.aio.ServicerContext[pb.WatchRunnersRequest, pb.WatchRunnersResponse],
    ) -> AsyncIterator[pb.WatchRunnersResponse]:
        """Tell how the runners stand, and each change."""
        async with aclosing(self._residency.watch()) as pictures:
            async for seen in pictures:
                yield pb.WatchRunnersResponse(
                    runners=[runner_message(status) for status in seen.runners],
                    events=[_event_message(change) for change in seen.changes],
                )

    async def PinModel(
        self, request: pb.PinModelRequest, context: grpc.aio.ServicerContext[pb.PinModelRequest, pb.PinModelResponse]
    ) -> AsyncIterator[pb.PinModelResponse]:
        """Load a model and keep it, and tell how it goes."""
        events = self._pins.pin(request.name, requested(request.parameters), caller=cache_scope_of(context))
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Waiting):
                    yield pb.PinModelResponse(progress=load_progress(event))
                else:
                    yield pb.PinModelResponse(runner=runner_message(event))

    async def UnpinModel(
        self,
        request: pb.UnpinModelRequest,
        context: grpc.aio.ServicerContext[pb.UnpinModelRequest, pb.UnpinModelResponse],
    ) -> pb.UnpinModelResponse:
        """Let a model leave like any other."""
        return pb.UnpinModelResponse(name=await self._pins.unpin(request.name))


def runner_message(status: RunnerStatus) -> pb.Runner:
    """Return a runner as the API shows it."""
    message = pb.Runner(
        name=status.name,
        digest=str(status.digest),
        state=_STATES[status.state],
        memory_bytes=status.memory_bytes,
        vram_bytes=status.vram_bytes,
        device=status.device,
        context_length=status.context_length,
        slots=status.slots,
        slots_busy=status.slots_busy,
        queued=status.queued,
        keep_forever=status.keep_forever,
        pid=status.pid,
        reason=status.reason,
        pinned=status.pinned,
        estimated_bytes=status.estimated_bytes,
        shares=[
            pb.DeviceShare(device=device, bytes=held_bytes)
            # Accelerators first.
            for device, held_bytes in sorted(status.shares, key=lambda share: (share[0] == "cpu", share[0]))
        ],
    )
    message.load_time.FromDatetime(status.load_started_at)
    if status.expires_at is not None:
        message.expire_time.FromDatetime(status.expires_at)
    if status.load_duration is not None:
        message.load_duration.CopyFrom(duration(status.load_duration // timedelta(microseconds=1) * 1000))
    if status.stats is not None:
        message.stats.CopyFrom(pb.EngineStats(**asdict(status.stats)))
    return message


def _event_message(change: RunnerChange) -> pb.RunnerEvent:
    state = _STATES[change.state] if change.state is not None else pb.Runner.STATE_UNSPECIFIED
    message = pb.RunnerEvent(name=change.name, digest=str(change.digest), state=state, reason=change.reason)
    message.time.FromDatetime(change.at)
    return message
