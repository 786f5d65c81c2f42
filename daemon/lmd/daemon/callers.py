"""Who makes a request.

gRPC for Python cannot tell the peer of a unix socket. The front reads it from the kernel and connects to the private
socket from a client socket whose abstract name carries it; gRPC reports that name as the peer. Nobody else reaches
the private socket: its directory is closed to other users.
"""

from __future__ import annotations

import functools
import pwd
import re
import secrets
from dataclasses import dataclass
from typing import Protocol

from lmd.daemon.errors import PermissionDenied

_PEER = re.compile(r"unix-abstract:lmd/(\d{1,10})/(\d{1,10})/[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated identity behind a request.

    Attributes:
        uid: the user, as the kernel saw it when the connection was made.
        pid: the process at that moment; it may have handed the connection on, so use it for logs only. None when
            the process lives outside of the daemon's PID namespace.
        user: the user's name, or the uid as text when it has none.
    """

    uid: int
    pid: int | None
    user: str


class HasPeer(Protocol):
    """The part of a gRPC context that is needed here."""

    def peer(self) -> str:
        """Return gRPC's name for the other end."""


def client_address(uid: int, pid: int) -> bytes:
    """Return a fresh abstract socket name that carries *uid* and *pid*."""
    return f"\0lmd/{uid}/{pid}/{secrets.token_hex(8)}".encode()


def caller_of(context: HasPeer) -> Caller:
    """Return the caller of a request.

    Raises:
        PermissionDenied: when the connection did not come through the front.
    """
    match = _PEER.fullmatch(context.peer())
    if match is None:
        raise PermissionDenied("the caller of this connection is not known", action="connect")
    uid, pid = int(match[1]), int(match[2])
    return Caller(uid=uid, pid=pid or None, user=user_name(uid))


@functools.lru_cache(maxsize=1024)
def user_name(uid: int) -> str:
    """Return the name of a user, or the uid as text."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
