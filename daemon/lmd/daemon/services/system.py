"""SystemService: tells about the daemon, and ends it."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio
import psutil
from google.protobuf.timestamp_pb2 import Timestamp

from lmd.daemon.admission import Admission
from lmd.daemon.blocking import BlockingPool
from lmd.daemon.callers import caller_of
from lmd.daemon.config import Config
from lmd.daemon.devices import Device
from lmd.daemon.dropin_folder import Obstacle
from lmd.daemon.errors import PermissionDenied
from lmd.v1 import system_service_pb2 as pb
from lmd.v1 import system_service_pb2_grpc as rpc
from lmd.v1.version import API_VERSION, __version__

#: Every client asks for the status first, so it stays small.
MAX_PROBLEMS = 50
MAX_MESSAGE_CHARS = 500


@dataclass(frozen=True, slots=True)
class HttpGateway:
    """Where the HTTP gateway answers; *detail* says why it does not, or why elsewhere than configured."""

    url: str = ""
    detail: str = "this version has no HTTP gateway"


class SystemServiceServicer(rpc.SystemServiceServicer):
    """Answers with what the daemon knows about itself; never waits for models."""

    def __init__(
        self,
        config: Config,
        *,
        socket: str,
        started_at: float,
        admission: Admission,
        pool: BlockingPool,
        shut_down: Callable[[], None],
        devices: Callable[[], Sequence[Device]],
        http: HttpGateway | None = None,
        obstacles: Callable[[], Sequence[Obstacle]] = tuple,
    ) -> None:
        self._config = config
        self._socket = socket
        self._started_at = started_at
        self._admission = admission
        self._pool = pool
        self._shut_down = shut_down
        self._devices = devices
        self._http = http or HttpGateway()
        self._obstacles = obstacles
        self._process = psutil.Process()

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[pb.GetStatusRequest, pb.GetStatusResponse]
    ) -> pb.GetStatusResponse:
        """Return what the daemon is and where it keeps things."""
        config = self._config
        obstacles = self._obstacles()
        return pb.GetStatusResponse(
            version=__version__,
            api_version=API_VERSION,
            pid=os.getpid(),
            uid=os.getuid(),
            socket=self._socket,
            http=self._http.url,
            http_detail=self._http.detail,
            store=str(config.store.path),
            config_file=str(config.file or ""),
            start_time=_timestamp(self._started_at),
            engine_version=engine_version(),
            devices=[_device(device) for device in await self._pool.run(self._devices)],
            rss_bytes=self._process.memory_info().rss,
            draining=self._admission.draining,
            dropin=str(config.dropin.path) if config.dropin.enabled else "",
            dropin_problems=[_problem(obstacle) for obstacle in obstacles[:MAX_PROBLEMS]],
            dropin_problem_count=len(obstacles),
        )

    async def Shutdown(
        self, request: pb.ShutdownRequest, context: grpc.aio.ServicerContext[pb.ShutdownRequest, pb.ShutdownResponse]
    ) -> pb.ShutdownResponse:
        """Begin to drain, if the caller may."""
        caller = caller_of(context)
        if caller.uid not in (0, os.getuid()):
            raise PermissionDenied(
                f"{caller.user} may not stop the daemon of uid {os.getuid()}", action="shut down the daemon"
            )
        self._shut_down()
        return pb.ShutdownResponse()


def engine_version() -> str:
    """Return the version of llama-cpp-python from its package metadata; empty when it is not installed."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMilliseconds(round(seconds * 1000))
    return stamp


def _problem(obstacle: Obstacle) -> pb.DropinProblem:
    message = obstacle.message
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[: MAX_MESSAGE_CHARS - 1]}…"
    return pb.DropinProblem(
        file=obstacle.file,
        message=message,
        since_time=_timestamp(obstacle.since),
        waiting=obstacle.waiting,
    )


def _device(device: Device) -> pb.Device:
    return pb.Device(
        id=device.id,
        description=device.description,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        reason=device.reason,
    )
