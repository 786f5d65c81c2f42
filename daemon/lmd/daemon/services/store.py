"""StoreService over gRPC: translates, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Literal

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.garbage import Collected, collect
from lmd.daemon.saved_kv import SavedKv
from lmd.daemon.services.messages import timestamp
from lmd.registry.errors import InvalidRequest
from lmd.registry.store import GarbageItem, Store
from lmd.v1 import store_service_pb2 as pb
from lmd.v1 import store_service_pb2_grpc as rpc

_KINDS = {
    "blob": pb.GarbageItem.KIND_BLOB,
    "ingest": pb.GarbageItem.KIND_INGEST,
    "quarantined": pb.GarbageItem.KIND_QUARANTINED,
}


class StoreServiceServicer(rpc.StoreServiceServicer):
    """Looks after the bytes of the store."""

    def __init__(self, store: Store, pool: BlockingPool, saved_kv: SavedKv) -> None:
        self._store = store
        self._pool = pool
        self._saved_kv = saved_kv

    async def GetDiskUsage(
        self, request: pb.GetDiskUsageRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.GetDiskUsageResponse:
        """Sum up what is stored."""
        usage = await self._pool.run(self._store.usage)
        return pb.GetDiskUsageResponse(
            models=usage.models,
            blobs=usage.blobs,
            blob_bytes=usage.blob_bytes,
            ingests=usage.ingests,
            ingest_bytes=usage.ingest_bytes,
            quarantined=usage.quarantined,
            quarantined_bytes=usage.quarantined_bytes,
            free_bytes=usage.free_bytes,
            version_bytes=usage.version_bytes,
            kv_bytes=await self._saved_kv.total_bytes(),
        )

    async def CollectGarbage(
        self, request: pb.CollectGarbageRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[pb.CollectGarbageResponse]:
        """Remove what nothing needs: one `item` each, then the `summary`."""
        grace_s = _seconds(request, "grace_period")
        history_s = _seconds(request, "history")
        events = collect(self._store, self._pool, dry_run=request.dry_run, grace_s=grace_s, history_s=history_s)
        async with aclosing(events):
            async for event in events:
                yield _response(event)


def _seconds(request: pb.CollectGarbageRequest, field: Literal["grace_period", "history"]) -> float | None:
    if not request.HasField(field):
        return None
    duration: Duration = getattr(request, field)
    seconds = duration.seconds + duration.nanos / 1e9
    if seconds < 0:
        raise InvalidRequest(f"`{field}` is negative", field=field)
    return seconds


def _response(event: GarbageItem | Collected) -> pb.CollectGarbageResponse:
    if isinstance(event, Collected):
        summary = pb.GarbageSummary(items=event.items, freed_bytes=event.freed_bytes, spared_items=event.spared_items)
        return pb.CollectGarbageResponse(summary=summary)
    item = pb.GarbageItem(
        kind=_KINDS[event.kind],
        digest=event.digest_or_name,
        size_bytes=event.size_bytes,
        modified_time=timestamp(event.modified_at),
    )
    return pb.CollectGarbageResponse(item=item)
