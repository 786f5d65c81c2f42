"""Opens the sockets of the gateway, or says why it cannot."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Sequence

import structlog

from lmd.daemon.http.config import Address

log = structlog.get_logger(__name__)

BACKLOG = 1024


def open_sockets(addresses: Sequence[str]) -> tuple[list[socket.socket], str]:
    """Return a listening socket for each address that can be had, and what to tell about the others."""
    sockets: list[socket.socket] = []
    problems: list[str] = []
    for text in addresses:
        address = Address.parse(text)
        try:
            sockets.append(_listen(address))
        except OSError as error:
            why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            problems.append(f"{address} {why}")
            log.warning("http_address_unusable", address=text, error=error.strerror)
    return sockets, "; ".join(problems)


def url_of(sock: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{Address(host, port)}"


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # With its protocol named: asyncio switches Nagle's algorithm off for nothing else, and an answer that is written in
    # two pieces then waits 40 ms for the acknowledgement of the first.
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, socket.IPPROTO_TCP)
    with contextlib.ExitStack() as stack:
        stack.callback(sock.close)
        # Only so that a restart need not wait for the connections of the last run; nobody can share the address.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address.host, address.port))
        sock.listen(BACKLOG)
        stack.pop_all()
    return sock
