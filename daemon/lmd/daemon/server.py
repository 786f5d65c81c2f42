"""The private gRPC server, and the services it offers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lmd.daemon.admission import Admission
from lmd.daemon.metrics import Metrics
from lmd.daemon.rpc_errors import error_interceptor
from lmd.daemon.rpc_metrics import metrics_interceptor

#: Adds one service to the server and returns its full name.
AddServicer = Callable[[grpc.aio.Server], str]

ServicerT = TypeVar("ServicerT")


def adder(name: str, add: Callable[[ServicerT, grpc.aio.Server], None], servicer: ServicerT) -> AddServicer:
    """Return what adds *servicer* with the generated function *add*; *name* is its service in the package lmd.v1."""

    def add_it(server: grpc.aio.Server) -> str:
        add(servicer, server)
        return f"lmd.v1.{name}"

    return add_it


MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_CONCURRENT_STREAMS = 128

_OPTIONS: list[tuple[str, int]] = [
    # On by default, and then two servers share one address without knowing.
    ("grpc.so_reuseport", 0),
    # A connection that never speaks is dropped after this; the default of two minutes lets a flood shut everybody out.
    ("grpc.server_handshake_timeout_ms", 2000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
]


class RpcServer:
    """A gRPC server on one unix socket in a directory that only the daemon enters.

    Health is NOT_SERVING until `set_serving(True)`.
    """

    def __init__(self, socket: Path, admission: Admission, metrics: Metrics, servicers: Sequence[AddServicer]) -> None:
        self.socket = socket
        self._server = grpc.aio.server(
            interceptors=[error_interceptor(), metrics_interceptor(metrics), admission.interceptor()],
            options=_OPTIONS,
        )
        self._services = [add(self._server) for add in servicers]
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )

    async def start(self) -> None:
        """Listen. A socket that a dead daemon left is replaced: the store's lock says that there is no other."""
        await self.set_serving(False)
        await asyncio.to_thread(self.socket.unlink, missing_ok=True)
        self._server.add_insecure_port(f"unix:{self.socket}")
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks whether work is taken."""
        answer = health_pb2.HealthCheckResponse
        state = answer.SERVING if serving else answer.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        """Close; calls that still run after *grace_s* are cancelled."""
        await self._server.stop(grace_s)
        await asyncio.to_thread(self.socket.unlink, missing_ok=True)
