"""The calls of RuntimeService about memory; the behaviour is in `lmd.daemon.residency`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc.aio

from lmd.daemon.callers import caller_of
from lmd.daemon.fitting import Fit, Fitting
from lmd.daemon.process_memory import ProcessTree
from lmd.daemon.residency.leasing import LeaseGranted
from lmd.daemon.residency.pins import Pins
from lmd.daemon.residency.residency import Residency
from lmd.daemon.services.inference import requested
from lmd.daemon.services.runtime import Models, RuntimeServiceServicer
from lmd.v1 import runtime_service_pb2 as pb


class RuntimeMemoryServicer(RuntimeServiceServicer):
    """The whole service: the runners, and what is asked about memory."""

    def __init__(self, catalog: Models, residency: Residency, pins: Pins, fitting: Fitting) -> None:
        super().__init__(catalog, residency, pins)
        self._leases = residency.leases
        self._fitting = fitting

    async def FitModel(
        self, request: pb.FitModelRequest, context: grpc.aio.ServicerContext[pb.FitModelRequest, pb.FitModelResponse]
    ) -> pb.FitModelResponse:
        """Tell whether a model fits."""
        fit = await self._fitting.fit(
            request.name, requested(request.parameters), caller=caller_of(context), token=request.token or None
        )
        return fit_message(fit)

    async def LeaseMemory(
        self,
        request: pb.LeaseMemoryRequest,
        context: grpc.aio.ServicerContext[pb.LeaseMemoryRequest, pb.LeaseMemoryResponse],
    ) -> AsyncIterator[pb.LeaseMemoryResponse]:
        """Hold memory until the caller hangs up."""
        tree = ProcessTree.owned(request.pid, caller_of(context).uid) if request.pid else None
        events = self._leases.hold(request.bytes, device=request.device, purpose=request.purpose, tree=tree)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, LeaseGranted):
                    share = pb.DeviceShare(device=event.device, bytes=event.size_bytes)
                    yield pb.LeaseMemoryResponse(granted=share)
                else:
                    yield pb.LeaseMemoryResponse(waiting=event.detail)


def fit_message(fit: Fit) -> pb.FitModelResponse:
    """Return a fit as the API shows it."""
    return pb.FitModelResponse(
        total_bytes=fit.total_bytes,
        weights_bytes=fit.weights_bytes,
        kv_bytes=fit.kv_bytes,
        compute_bytes=fit.compute_bytes,
        beside_bytes=fit.beside_bytes,
        fits=fit.fits,
        measured=fit.measured,
        shares=[pb.DeviceShare(device=device, bytes=size) for device, size in fit.shares],
        gpu_layers=fit.gpu_layers,
        layers=fit.layers,
        evicted=fit.evicted,
        context_length=fit.context_length,
        largest_context_length=fit.largest_context_length,
        trained_context_length=fit.trained_context_length,
        slots=fit.slots,
        tokens_per_second=fit.tokens_per_second,
        active_bytes=fit.active_bytes,
        calibrated=fit.calibrated,
        stored=fit.stored,
        download_bytes=fit.download_bytes,
        reason=fit.reason,
    )
