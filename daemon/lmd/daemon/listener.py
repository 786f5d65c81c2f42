"""The public socket: handed in by systemd, or bound here without disturbing a daemon that lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

from lmd.daemon.places import SOCKET_GROUP
from lmd.registry.errors import LmdError
from lmd.v1.endpoint import MAX_SOCKET_PATH_BYTES, SYSTEM_SOCKET

BACKLOG = 128

#: systemd passes sockets from this number on (sd_listen_fds(3)).
FIRST_PASSED_FD = 3

_UCRED = struct.Struct("3i")


class SocketUnusable(LmdError):
    """Raised when the public socket cannot be served: somebody else serves it, or the place is not safe."""


def peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of the process at the other end, as they were when it connected or listened.

    Source: unix(7), SO_PEERCRED. The pid is 0 when that process is outside of our PID namespace.
    """
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF


def prepare_directory(directory: Path, mode: int) -> None:
    """Create *directory* (and its parents, for us alone) with *mode*, or check that an existing one is safe.

    Safe is: a real directory of ours or of root, which nobody else can write to. In any other, somebody could put
    their own socket in our place.

    Raises:
        SocketUnusable: when it is not.
    """
    if not directory.is_symlink() and not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            directory.chmod(mode)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise SocketUnusable(f"{directory} is not a directory", hint="move it away, or configure another place")
    if found.st_uid not in (os.geteuid(), 0):
        raise SocketUnusable(
            f"{directory} belongs to uid {found.st_uid}, who could take over the socket",
            hint="configure `server.socket` in a directory of your own",
        )
    if found.st_mode & 0o022:
        raise SocketUnusable(
            f"other users may write to {directory} (mode {found.st_mode & 0o7777:o}), and could take over the socket",
            hint=f"run `chmod go-w {directory}`, or configure `server.socket` elsewhere",
        )


def check_path_length(path: Path, *, hint: str = "choose a shorter `LMD_HOME`") -> None:
    """Refuse a path that does not fit into a socket address.

    Raises:
        SocketUnusable: with the number of bytes to save.
    """
    excess = len(os.fsencode(path)) - MAX_SOCKET_PATH_BYTES
    if excess > 0:
        raise SocketUnusable(
            f"the socket path {path} is {excess} bytes longer than the {MAX_SOCKET_PATH_BYTES} that the system allows",
            hint=hint,
        )


class Listener:
    """The listening socket, and what must be undone at the end."""

    def __init__(self, sock: socket.socket, path: Path, *, lock_fd: int | None, inode: int | None) -> None:
        self.sock = sock
        self.path = path
        self._lock_fd = lock_fd
        self._inode = inode

    @property
    def activated(self) -> bool:
        """Whether systemd owns the socket."""
        return self._lock_fd is None

    def close(self) -> None:
        """Stop listening, and remove the socket unless it is systemd's or was replaced. Safe to call twice."""
        self.sock.close()
        if self._lock_fd is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()
        os.close(self._lock_fd)
        self._lock_fd = None


def open_listener(path: Path, passed: Mapping[str, str], *, pid: int) -> Listener:
    """Take the socket that systemd passed (its variables are in *passed*), or bind *path*.

    Raises:
        SocketUnusable: when a live daemon serves *path*, or the place is not safe, or what was passed is not usable.
    """
    activated = _passed_socket(passed, pid)
    if activated is not None:
        activated.setblocking(False)
        name = activated.getsockname()
        return Listener(activated, Path(name) if isinstance(name, str) else path, lock_fd=None, inode=None)
    return _bind(path)


def _passed_socket(passed: Mapping[str, str], pid: int) -> socket.socket | None:
    if passed.get("LISTEN_PID") != str(pid) or passed.get("LISTEN_FDS", "0") == "0":
        return None
    if passed["LISTEN_FDS"] != "1":
        raise SocketUnusable(
            f"systemd passes {passed['LISTEN_FDS']} sockets, expected one", hint="keep one ListenStream= in lmd.socket"
        )
    os.set_inheritable(FIRST_PASSED_FD, False)
    try:
        sock = socket.socket(fileno=FIRST_PASSED_FD)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise SocketUnusable(f"file descriptor 3 is not a socket: {error.strerror}") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listening:
        raise SocketUnusable(
            "systemd passes something else than a listening unix stream socket",
            hint="ListenStream= in lmd.socket must be a path",
        )
    return sock


def _bind(path: Path) -> Listener:
    check_path_length(path, hint="choose a shorter `LMD_HOME`, or set `server.socket` (LMD_SERVER_SOCKET)")
    shared = path == SYSTEM_SOCKET
    prepare_directory(path.parent, 0o755 if shared else 0o700)
    lock_fd = _lock(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        # Until listen() nobody can connect, so the mode is right before the first connection.
        sock.bind(os.fspath(path))
        path.chmod(0o660 if shared else 0o600)
        if shared:
            with contextlib.suppress(KeyError, PermissionError):  # no such group, or not ours to give: root's then
                os.chown(path, -1, grp.getgrnam(SOCKET_GROUP).gr_gid)
        inode = path.lstat().st_ino
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException as error:
        sock.close()
        os.close(lock_fd)
        if isinstance(error, OSError):
            raise SocketUnusable(f"cannot listen on {path}: {error.strerror}") from None
        raise
    return Listener(sock, path, lock_fd=lock_fd, inode=inode)


def _lock(path: Path) -> int:
    """Own *path* for as long as the returned descriptor is open; two daemons cannot both find a stale socket."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SocketUnusable(f"cannot lock {lock}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise _served(path, _listener_pid(path)) from None
    return fd


def _remove_stale(path: Path) -> None:
    """Remove the socket that a dead daemon left.

    Raises:
        SocketUnusable: when something lives there, or it is not a socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketUnusable(f"{path} exists and is not a socket", hint="move it away, or configure another place")
    pid = _listener_pid(path)
    if pid is not None:
        raise _served(path, pid)
    path.unlink()


def _listener_pid(path: Path) -> int | None:
    """Return the pid that listens on *path*; 0 when somebody does but does not say who; None when nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:  # its backlog is full: alive
            return 0
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return None
            raise
        return peer_credentials(probe)[0]


def _served(path: Path, pid: int | None) -> SocketUnusable:
    who = f"a daemon with pid {pid}" if pid else "another daemon"
    return SocketUnusable(
        f"{who} already serves {path}",
        hint="use that one (`lm status`), stop it first, or give this one a place of its own with `--home`",
    )
