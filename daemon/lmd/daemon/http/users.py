"""Which users of this machine the gateway serves: those who could connect to the daemon's socket.

The loopback interface is open to everybody on the machine; the socket is not. The gateway asks the socket's own modes,
so that one rule, set in one place, says who may use the daemon.
"""

from __future__ import annotations

import os
import pwd
import stat
import time
from pathlib import Path

#: How long an answer holds; users join groups while daemons run.
FRESH_S = 30.0
_WRITE, _SEARCH = 0o2, 0o1


class SocketUsers:
    """The users who may connect to the socket at *path*."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[int, tuple[float, bool]] = {}

    def allow(self, uid: int) -> bool:
        """Tell whether a user may connect; looks at the file system at most every half minute for each."""
        now = time.monotonic()
        checked_at, allowed = self._known.get(uid, (-FRESH_S, False))
        if now - checked_at >= FRESH_S:
            allowed = may_connect(self._path, uid)
            self._known[uid] = now, allowed
        return allowed


def may_connect(path: Path, uid: int) -> bool:
    """Tell whether the modes of a socket, and of the directories above it, let a user connect to it."""
    if uid in (0, os.geteuid()):
        return True
    groups = _groups_of(uid)
    try:
        return _grants(path.stat(), uid, groups, _WRITE) and all(
            _grants(directory.stat(), uid, groups, _SEARCH) for directory in path.parents
        )
    except OSError:
        return False


def _grants(status: os.stat_result, uid: int, groups: frozenset[int], right: int) -> bool:
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid == uid:
        return bool(mode & right << 6)
    if status.st_gid in groups:
        return bool(mode & right << 3)
    return bool(mode & right)


def _groups_of(uid: int) -> frozenset[int]:
    try:
        entry = pwd.getpwuid(uid)
        return frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
    except (KeyError, OSError):
        return frozenset()
