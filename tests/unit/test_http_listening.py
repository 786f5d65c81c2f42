from __future__ import annotations

import asyncio
import socket

from lmd.daemon.http.listening import open_sockets


async def test_small_answers_leave_at_once() -> None:
    """Sockets that did not say they were TCP kept Nagle's algorithm: 40 ms for answers on connections that stay."""
    (listening,), problem = open_sockets(["127.0.0.1:0"])
    assert not problem
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    class Seen(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            sock = transport.get_extra_info("socket")
            accepted.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async with await asyncio.get_running_loop().create_server(Seen, sock=listening):
        _, writer = await asyncio.open_connection(*listening.getsockname())
        assert await accepted
        writer.close()
        await writer.wait_closed()
