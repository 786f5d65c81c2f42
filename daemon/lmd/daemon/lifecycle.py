"""The life of the daemon: start in order, serve, drain, stop in the opposite order.

Start: directories, the application (it locks the store, so a second daemon ends here and disturbs nobody), the public
socket, the private server, the front, READY. From the moment the public socket listens, clients that connect wait in
its backlog instead of failing.

Stop: new work is refused with DRAINING and the application winds down; running answers may go on for
`runtime.drain_timeout`; what is left is cut and told DRAINING; then everything closes. The first SIGTERM or SIGINT
begins this, a second one ends the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog

from lmd.daemon.admission import Admission
from lmd.daemon.blocking import BlockingPool
from lmd.daemon.config import Config
from lmd.daemon.devices import Device
from lmd.daemon.dropin_folder import Obstacle
from lmd.daemon.front import Front
from lmd.daemon.http.listening import open_sockets, url_of
from lmd.daemon.http.users import SocketUsers
from lmd.daemon.listener import Listener, check_path_length, open_listener, prepare_directory
from lmd.daemon.metrics import Metrics
from lmd.daemon.places import Dirs
from lmd.daemon.residency.values import SAVE_S
from lmd.daemon.sd_notify import Notifier
from lmd.daemon.server import AddServicer, RpcServer, adder
from lmd.daemon.services.system import HttpGateway, SystemServiceServicer, engine_version
from lmd.v1.endpoint import SYSTEM_SOCKET
from lmd.v1.system_service_pb2_grpc import add_SystemServiceServicer_to_server
from lmd.v1.version import __version__

if TYPE_CHECKING:
    from lmd.daemon.http.gateway import HttpApplication

log = structlog.get_logger(__name__)

#: Threads for short blocking work: index queries, small files, device queries.
POOL_WORKERS = 8
#: For closing connections and runners after the drain.
STOP_GRACE_S = 5.0
#: For telling callers that their answers are cut.
TELL_S = 2.0
#: How long an orderly stop may take after the second signal.
FORCED_EXIT_S = 3 * STOP_GRACE_S
#: Descriptors for the store, runners, pulls and logs, beside those of connections.
RESERVED_FDS = 256
MAX_FDS = 65536
#: A connection takes one descriptor at the front, one to the private server, and one in it; and there may be as many to
#: the HTTP gateway, of one each.
FDS_PER_CONNECTION = 4


class Application(Protocol):
    """What the daemon does, as its life cycle sees it."""

    @property
    def servicers(self) -> Sequence[AddServicer]:
        """Return what adds each gRPC service to the server; asked once, after `start`."""
        ...

    async def start(self) -> None:
        """Open the store and whatever works on it; afterwards requests can be served."""
        ...

    def devices(self) -> Sequence[Device]:
        """Return the devices as they are now, main memory first; blocks for milliseconds, thread-safe."""
        ...

    def http(self) -> HttpApplication:
        """Return what the HTTP gateway serves; asked after `start`, and only when there is a gateway."""
        ...

    def obstacles(self) -> Sequence[Obstacle]:
        """Return what is in the way of files in the drop-in folder."""
        ...

    async def drain(self) -> None:
        """Refuse what only waits, and stop what goes on without a request; called when the daemon begins to stop."""
        ...

    def cut(self) -> None:
        """End the answers that still run; each of their callers is told why, in a moment."""
        ...

    async def stop(self) -> None:
        """End everything; no request runs any more. Called also when `start` failed."""
        ...


MakeApplication = Callable[[Config, BlockingPool, Metrics], Application]


class Lifecycle:
    """Runs one daemon; use once."""

    def __init__(self, config: Config, env: Mapping[str, str], make_application: MakeApplication) -> None:
        self._config = config
        self._env = env
        self._make_application = make_application
        self._notifier = Notifier(env)
        self._admission = Admission()
        self._metrics = Metrics(engine_version=engine_version())
        self._stop_now = asyncio.Event()
        self._started_at = time.time()

    async def run(self) -> None:
        """Serve until told to stop.

        Raises:
            LmdError: when the daemon cannot start.
        """
        self._catch_signals()
        pool = BlockingPool(POOL_WORKERS)
        max_total = _connections_that_fit(_raise_descriptor_limit())
        prepare_places(self._config.dirs)
        application = self._make_application(self._config, pool, self._metrics)
        try:
            if not await self._start(application):
                return
            with contextlib.closing(open_listener(self._config.server.socket, self._env, pid=os.getpid())) as listener:
                async with self._serving(application, pool, listener, max_total):
                    await self._admission.wait_draining()
                    await self._drain(application)
        finally:
            await application.stop()
            pool.close()
        log.info("stopped")

    async def _start(self, application: Application) -> bool:
        """Start the application; a signal meanwhile ends the attempt. Returns whether it has started."""
        starting = asyncio.create_task(application.start(), name="start")
        told_to_stop = asyncio.create_task(self._admission.wait_draining())
        try:
            await asyncio.wait([starting, told_to_stop], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return False
            await starting
            return True
        finally:
            for task in (starting, told_to_stop):
                task.cancel()
            await asyncio.wait([starting, told_to_stop])

    @asynccontextmanager
    async def _serving(
        self, application: Application, pool: BlockingPool, listener: Listener, max_total: int
    ) -> AsyncIterator[None]:
        async with self._gateway(application, listener.path, max_total) as http:
            system = SystemServiceServicer(
                self._config,
                socket=str(listener.path),
                started_at=self._started_at,
                admission=self._admission,
                pool=pool,
                shut_down=self._admission.drain,
                devices=application.devices,
                http=http,
                obstacles=application.obstacles,
            )
            async with self._serving_rpc(application, system, listener, max_total):
                yield

    @asynccontextmanager
    async def _gateway(self, application: Application, socket_path: Path, max_total: int) -> AsyncIterator[HttpGateway]:
        """Serve HTTP where it can be served, and yield where that is."""
        config = self._config.http
        if not config.enabled:
            yield HttpGateway(detail="switched off by `http.enabled`")
            return
        sockets, problem = open_sockets(config.listen)
        if not sockets:
            yield HttpGateway(detail=problem)
            return
        # Imported only now: it costs time and memory.
        from lmd.daemon.http.gateway import Gateway

        gateway = Gateway(
            application.http(),
            config,
            self._admission,
            max_connections=max_total,
            serves=SocketUsers(socket_path).allow if config.users == "socket" else lambda uid: True,
        )
        urls = [url_of(sock) for sock in sockets]
        await gateway.start(sockets)
        log.info("http_ready", urls=urls)
        try:
            yield HttpGateway(url=" ".join(urls), detail=problem)
        finally:
            await gateway.stop()

    @asynccontextmanager
    async def _serving_rpc(
        self, application: Application, system: SystemServiceServicer, listener: Listener, max_total: int
    ) -> AsyncIterator[None]:
        servicers = [adder("SystemService", add_SystemServiceServicer_to_server, system), *application.servicers]
        rpc = RpcServer(self._config.dirs.private / "grpc.sock", self._admission, self._metrics, servicers)
        await rpc.start()
        front = Front(
            listener.sock,
            rpc.socket,
            max_per_uid=self._config.server.max_connections_per_user,
            max_total=max_total,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(front.serve(), name="front")]
                if self._notifier.watchdog_interval_s is not None:
                    background.append(tasks.create_task(self._watchdog(self._notifier.watchdog_interval_s)))
                await rpc.set_serving(True)
                log.info("ready", version=__version__, pid=os.getpid(), socket=str(listener.path))
                self._notifier.ready(f"serving {listener.path}")
                try:
                    yield
                finally:
                    await rpc.set_serving(False)
                    # The private server says goodbye on each connection; the front passes it on, and then goes too.
                    await rpc.stop(STOP_GRACE_S)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(STOP_GRACE_S):
                            await front.wait_idle()
                    for task in background:
                        task.cancel()
        finally:
            await rpc.stop(0)

    async def _drain(self, application: Application) -> None:
        allowed_s = self._config.runtime.drain_timeout.total_seconds()
        log.info("draining", running=self._admission.running, timeout_s=allowed_s)
        self._notifier.stopping("draining", within_s=allowed_s + SAVE_S + 4 * STOP_GRACE_S)
        async with asyncio.TaskGroup() as tasks:
            # What goes on without a request must not hold up the answers that finish meanwhile, nor the reverse.
            winding_down = tasks.create_task(application.drain())
            waits = [
                tasks.create_task(self._admission.wait_idle()),
                tasks.create_task(self._stop_now.wait()),
            ]
            await asyncio.wait(waits, timeout=allowed_s, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()
            if self._admission.running:
                log.warning("answers_cut", running=self._admission.running)
                application.cut()
                # An answer that has begun can only be told in its own words, by who writes it.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TELL_S):
                        await self._admission.wait_idle()
                self._admission.expire()
            await asyncio.wait([winding_down], timeout=STOP_GRACE_S)
            winding_down.cancel()

    async def _watchdog(self, interval_s: float) -> None:
        """Show that the event loop still turns."""
        while True:
            self._notifier.alive()
            await asyncio.sleep(interval_s)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup makes us ignore SIGHUP; leave it so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._admission.draining:
            log.warning("stopping_now", signal=number.name)
            if not self._stop_now.is_set():
                # Whatever hangs, the second signal ends the process.
                asyncio.get_running_loop().call_later(FORCED_EXIT_S, os._exit, 1)
            self._stop_now.set()
        else:
            log.info("signal_received", signal=number.name)
            self._admission.drain()


def prepare_places(dirs: Dirs) -> None:
    """Create the runtime directory, and the private one in it that nobody else may enter.

    Raises:
        SocketUnusable: when one exists and is not safe.
    """
    # Everybody must reach the system's socket, whose own mode says who may use it.
    prepare_directory(dirs.runtime, 0o755 if dirs.runtime == SYSTEM_SOCKET.parent else 0o700)
    prepare_directory(dirs.private, 0o700)
    dirs.private.chmod(0o700)
    check_path_length(dirs.private / "grpc.sock")


def _raise_descriptor_limit() -> int:
    """Take as many descriptors as the system allows and we can use, and return how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FDS if hard == resource.RLIM_INFINITY else min(hard, MAX_FDS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _connections_that_fit(descriptors: int) -> int:
    return max((descriptors - RESERVED_FDS) // FDS_PER_CONNECTION, 1)
