"""The front: accepts on the public socket, learns who connects, and splices bytes to the private gRPC socket.

Each public connection gets one private connection, from a client socket whose name carries the caller (`callers.py`).
Bytes pass through untouched in both directions, each with its own end and its own backpressure: a side that does not
read stops the other side from being read, so a connection holds at most the buffers of its sockets and two times
`BUFFER_BYTES`. A connection that never speaks is closed by the handshake time-out of the private server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections import Counter
from pathlib import Path
from typing import cast

import structlog

from lmd.daemon.callers import client_address, user_name
from lmd.daemon.listener import peer_credentials

log = structlog.get_logger(__name__)

#: Bytes that wait in the daemon for a side that does not read, before the other side is no longer read.
BUFFER_BYTES = 256 * 1024
#: How long the last bytes may take to leave once the other side has gone.
LINGER_S = 10.0
#: How long the private server may take to accept.
CONNECT_TIMEOUT_S = 5.0
#: Pause after the process or the machine ran out of descriptors or buffers.
EXHAUSTED_PAUSE_S = 0.1

_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Front:
    """Serves a listening socket.

    *max_per_uid* bounds the connections of one user, *max_total* those of all; what comes above is closed at once.
    """

    def __init__(self, listening: socket.socket, private_socket: Path, *, max_per_uid: int, max_total: int) -> None:
        self._listening = listening
        self._private = os.fspath(private_socket)
        self._max_per_uid = max_per_uid
        self._max_total = max_total
        self._open: Counter[int] = Counter()
        self._refusing: set[int] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def connections(self) -> int:
        """How many public connections are open."""
        return self._open.total()

    async def wait_idle(self) -> None:
        """Return when no connection is open."""
        await self._idle.wait()

    async def serve(self) -> None:
        """Accept until cancelled; then every open connection is cut."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as connections:
            while True:
                try:
                    sock, _ = await loop.sock_accept(self._listening)
                except OSError as error:
                    if error.errno not in _EXHAUSTED | {errno.ECONNABORTED}:
                        raise
                    log.warning("accept_failed", error=error.strerror)
                    await asyncio.sleep(EXHAUSTED_PAUSE_S)
                    continue
                pid, uid, _gid = peer_credentials(sock)
                if self._admit(uid, pid):
                    connections.create_task(self._serve_connection(sock, uid, pid))
                else:
                    sock.close()

    def _admit(self, uid: int, pid: int) -> bool:
        if self._open[uid] < self._max_per_uid and self.connections < self._max_total:
            self._open[uid] += 1
            self._idle.clear()
            return True
        if uid not in self._refusing:  # once, not for every connection of a flood
            self._refusing.add(uid)
            log.warning("connections_refused", uid=uid, user=user_name(uid), pid=pid, open=self._open[uid])
        return False

    def _release(self, uid: int) -> None:
        self._open[uid] -= 1
        if self._open[uid] <= self._max_per_uid // 2:
            self._refusing.discard(uid)
        if not self._open[uid]:
            del self._open[uid]
        if not self._open:
            self._idle.set()

    async def _serve_connection(self, sock: socket.socket, uid: int, pid: int) -> None:
        try:
            await _splice(sock, self._private, client_address(uid, pid))
        except (OSError, TimeoutError) as error:
            log.warning("connection_failed", uid=uid, pid=pid, error=str(error) or "timed out")
        except Exception:  # a defect in one connection must not end the others
            log.exception("connection_defect", uid=uid, pid=pid)
        finally:
            sock.close()
            self._release(uid)


async def _splice(public_sock: socket.socket, private_path: str, address: bytes) -> None:
    """Connect to the private socket and pass bytes until both connections are gone."""
    loop = asyncio.get_running_loop()
    private_sock = await _connect(private_path, address)
    public, private = _Side(may_half_close=True), _Side(may_half_close=False)
    public.other, private.other = private, public
    try:
        await loop.create_connection(lambda: private, sock=private_sock)
        await loop.connect_accepted_socket(lambda: public, public_sock)
        private.start()
        await public.gone.wait()
        await private.gone.wait()
    finally:
        for side in (public, private):
            side.abort()
        private_sock.close()


async def _connect(path: str, address: bytes) -> socket.socket:
    """Return a socket named *address*, connected to *path*.

    A unix socket connects at once, or says EAGAIN when the backlog is full; the event loop's own connect would take
    that for a connection in progress.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(address)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while True:
                with contextlib.suppress(BlockingIOError):
                    sock.connect(path)
                    return sock
                await asyncio.sleep(0.01)
    except BaseException:
        sock.close()
        raise


class _Side(asyncio.Protocol):
    """One end of a splice: what it reads is written to *other*. *gone* is set when its connection is closed.

    A client may end its direction and still read (*may_half_close*). When the gRPC server ends its own, it has closed
    the connection, which reading cannot tell from a half close: both sides are closed then, or a client that never
    speaks would keep its place after the server has dropped it.
    """

    other: _Side
    transport: asyncio.Transport

    def __init__(self, *, may_half_close: bool) -> None:
        self.gone = asyncio.Event()
        self._may_half_close = may_half_close
        self._ended = False
        self._made = False
        self._waits = False
        self._early = b""
        self._linger: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport; the first side waits for the second before it reads."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._made = True
        if not self.other._made:
            self._waits = True
            self.transport.pause_reading()

    def start(self) -> None:
        """Read from now on: the other side is there."""
        self._waits = False
        if self._early:
            self.other.transport.write(self._early)
            self._early = b""
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Pass bytes on."""
        if self._waits:
            # Up to Python 3.11.3 a transport that is paused as soon as it is made reads all the same.
            self._early += data
            return
        self.other.transport.write(data)

    def pause_writing(self) -> None:
        """Stop reading the other side: this one does not keep up."""
        self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read the other side again."""
        if not self.other._ended:
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        """Pass the end of this direction on, or close; returns whether the connection stays open for the other one."""
        self._ended = True
        if self._may_half_close and not self.other.transport.is_closing():
            self.other.transport.write_eof()
        return self._may_half_close

    def connection_lost(self, error: Exception | None) -> None:
        """Let the last bytes of the other side leave, then close it."""
        if self._linger is not None:
            self._linger.cancel()
        self.gone.set()
        self.other.finish()

    def finish(self) -> None:
        """Close once what is buffered is written, or when that takes too long."""
        if self._made and not self.transport.is_closing():
            self.transport.close()
            self._linger = asyncio.get_running_loop().call_later(LINGER_S, self.transport.abort)

    def abort(self) -> None:
        """Close at once."""
        if self._made and not self.gone.is_set():
            self.transport.abort()
        if self._linger is not None:
            self._linger.cancel()
