"""The daemon's shell around services of a test: front, private gRPC server, admission; no models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from lmd.daemon.admission import Admission
from lmd.daemon.callers import caller_of
from lmd.daemon.front import Front
from lmd.daemon.listener import Listener, open_listener
from lmd.daemon.metrics import Metrics
from lmd.daemon.server import AddServicer, RpcServer


class Probe(grpc.GenericRpcHandler):
    """A service of raw bytes, /probe/…; a request to Stream is a JSON list of how many chunks and their size."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.streamed_bytes = 0
        self.hanging = asyncio.Event()

    def service(self, handler_call_details: Any) -> Any:
        name = str(handler_call_details.method).removeprefix("/probe/")
        kinds: dict[str, Any] = {
            "WhoAmI": grpc.unary_unary_rpc_method_handler(self.who_am_i),
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo),
            "Stream": grpc.unary_stream_rpc_method_handler(self.stream),
            "Sink": grpc.stream_unary_rpc_method_handler(self.sink),
            "Hang": grpc.unary_unary_rpc_method_handler(self.hang),
        }
        return kinds.get(name) if str(handler_call_details.method).startswith("/probe/") else None

    async def who_am_i(self, request: bytes, context: Any) -> bytes:
        self.calls.append("WhoAmI")
        caller = caller_of(context)
        return json.dumps([caller.uid, caller.pid, caller.user]).encode()

    async def echo(self, request: bytes, context: Any) -> bytes:
        self.calls.append("Echo")
        return request

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        count, size = json.loads(request)
        for number in range(count):
            chunk = number.to_bytes(4, "big") * (size // 4)
            self.streamed_bytes += len(chunk)
            yield chunk

    async def sink(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        total = 0
        async for chunk in requests:
            total += len(chunk)
        return str(total).encode()

    async def hang(self, request: bytes, context: Any) -> bytes:
        self.hanging.set()
        await asyncio.Event().wait()
        return b""

    def add(self, server: grpc.aio.Server) -> str:
        server.add_generic_rpc_handlers((self,))
        return "probe"


class Shell:
    """A running front and server."""

    def __init__(self, path: Path, probe: Probe, front: Front, admission: Admission, rpc: RpcServer) -> None:
        self.path = path
        self.probe = probe
        self.front = front
        self.admission = admission
        self.rpc = rpc

    def channel(self) -> grpc.aio.Channel:
        # Channels to one address share a connection, unless they are told not to.
        return grpc.aio.insecure_channel(f"unix:{self.path}", options=[("grpc.use_local_subchannel_pool", 1)])


@asynccontextmanager
async def shell(
    directory: Path,
    *,
    max_per_uid: int = 64,
    max_total: int = 1000,
    listener: Listener | None = None,
    upstream: Path | None = None,
    servicers: Sequence[AddServicer] = (),
) -> AsyncIterator[Shell]:
    """Run front and server in *directory*; the front connects to *upstream* instead of the server when it is given."""
    private = directory / "private"
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    probe, admission = Probe(), Admission()
    rpc = RpcServer(private / "grpc.sock", admission, Metrics(), [probe.add, *servicers])
    await rpc.start()
    await rpc.set_serving(True)
    listener = listener or open_listener(directory / "lmd.sock", {}, pid=0)
    front = Front(listener.sock, upstream or rpc.socket, max_per_uid=max_per_uid, max_total=max_total)
    serving = asyncio.create_task(front.serve())
    try:
        yield Shell(listener.path, probe, front, admission, rpc)
    finally:
        await rpc.stop(0)
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        listener.close()
