"""Whose process is at the other end of a TCP connection over the loopback interface.

Both ends are sockets of this kernel, so it knows: sock_diag tells the user of the socket with given addresses, in
about 5 µs, whatever else is open. Where netlink is not to be had, /proc/net/tcp and tcp6 tell the same, line by line.

What keeps the answer true:

- Only a socket that a process still holds counts (one with an inode): an orphan is listed with uid 0.
- Our own end must be open *after* the look-up. As long as it is, no other socket can have the addresses of its peer;
  had the peer gone and its port been taken by another user, our end would be closed.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NO_COOKIE = 0xFFFFFFFF
#: struct nlmsghdr; the fixed head of inet_diag_req_v2; the ports, and behind the addresses interface and cookie, of
#: inet_diag_sockid; the four numbers that end inet_diag_msg. Source: linux/netlink.h, linux/inet_diag.h.
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_PORTS = struct.Struct("!HH")
_COOKIE = struct.Struct("=III")
_STATE = struct.Struct("=BB")
_TAIL = struct.Struct("=IIIII")
_ID_BYTES = 48

#: TCP states in which an end is connected: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
_CONNECTED = frozenset({1, 4, 5, 8})
#: In which ours is: the peer may have ended its direction, nothing else.
_OPEN = frozenset({1, 8})

_PROC = Path("/proc/net")


class Attributor:
    """Tells the user at the other end of accepted connections. Not thread-safe; `close` it."""

    def __init__(self, *, netlink: bool = True, proc: Path = _PROC) -> None:
        self._proc = proc
        self._netlink: socket.socket | None = None
        if netlink:
            try:
                self._netlink = socket.socket(
                    socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
                )
            except OSError as error:
                log.warning("sock_diag_missing", error=error.strerror)

    def close(self) -> None:
        """Close the netlink socket."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def uid_of_peer(self, sock: socket.socket) -> int | None:
        """Return the uid of the process at the other end of *sock*; None when it is remote, gone, or not known."""
        try:
            own, peer = sock.getsockname(), sock.getpeername()
            if not is_loopback(peer[0]):
                return None
            uid = self._ask_kernel(sock.family, peer, own) if self._netlink else self._read_proc(peer, own)
            state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ENOENT):
                log.warning("attribution_failed", error=error.strerror)
            return None
        return uid if state in _OPEN else None

    def _ask_kernel(self, family: int, peer: tuple[str, int], own: tuple[str, int]) -> int | None:
        assert self._netlink is not None
        identity = (
            _PORTS.pack(peer[1], own[1])
            + _packed(family, peer[0])
            + _packed(family, own[0])
            + _COOKIE.pack(0, _NO_COOKIE, _NO_COOKIE)
        )
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + identity
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
        self._netlink.send(header + request)
        # The kernel has answered by the time that send returns.
        answer = self._netlink.recv(8192, socket.MSG_DONTWAIT)
        _, kind, _, _, _ = _HEADER.unpack_from(answer)
        if kind != _SOCK_DIAG_BY_FAMILY:
            return None  # an error, ENOENT as a rule: no such socket
        _, state = _STATE.unpack_from(answer, _HEADER.size)
        told_ports = answer[_HEADER.size + 4 : _HEADER.size + 8]
        _, _, _, uid, inode = _TAIL.unpack_from(answer, _HEADER.size + 4 + _ID_BYTES)
        # The kernel falls back to listeners, whose other port is 0.
        if state not in _CONNECTED or not inode or told_ports != identity[:4]:
            return None
        return int(uid)

    def _read_proc(self, peer: tuple[str, int], own: tuple[str, int]) -> int | None:
        wanted = {(f"{_in_proc(peer, six)} {_in_proc(own, six)}").encode() for six in _families(peer[0])}
        for name in ("tcp", "tcp6"):
            for line in _lines(self._proc / name):
                columns = line.split()
                if b" ".join(columns[1:3]) in wanted:
                    state, uid, inode = int(columns[3], 16), int(columns[7]), int(columns[9])
                    return uid if state in _CONNECTED and inode else None
        return None


def is_loopback(host: str) -> bool:
    """Tell whether an address is of the loopback interface, in either notation."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _packed(family: int, host: str) -> bytes:
    return socket.inet_pton(family, host.partition("%")[0]).ljust(16, b"\0")


def _families(host: str) -> tuple[bool, ...]:
    """Return whether to look for the IPv6 notation; an IPv6 socket may speak to an IPv4 address."""
    return (True,) if ":" in host else (False, True)


def _in_proc(address: tuple[str, int], six: bool) -> str:
    """Return an address as /proc/net/tcp writes it: 32-bit words in the machine's byte order, in hexadecimal."""
    host = address[0].partition("%")[0]
    if six and ":" not in host:
        host = f"::ffff:{host}"
    packed = socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"


def _lines(file: Path) -> Iterator[bytes]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return  # a kernel without IPv6
    yield from content.split(os.linesep.encode())[1:]
