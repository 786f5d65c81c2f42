"""Finding the daemon: which sockets to try, and whether who listens there may be trusted.

A prompt is private, and the client sends tokens. So before a byte goes out, the process behind the socket must be
one the user has reason to trust: root, the user, or, where the path was given by the user or is the system's, the
owner of the directory (the service user).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lmd.cli.errors import Unreachable
from lmd.v1.endpoint import MAX_SOCKET_PATH_BYTES, SYSTEM_SOCKET, client_sockets, user_socket

_CONNECT_TIMEOUT_S = 5.0
_UCRED = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)


class Answer(Enum):
    """What a socket path has to offer."""

    LISTENS = "listens"
    ABSENT = "absent"
    FORBIDDEN = "forbidden"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client looks for a daemon.

    *own* is where a daemon started by this user listens. *named* says that `--socket` asks for one certain daemon;
    then none is started. *implicit* is the one path nobody chose.
    """

    candidates: tuple[Path, ...]
    own: Path
    named: bool = False
    implicit: Path | None = None


def place_from(env: Mapping[str, str], explicit: Path | None) -> Place:
    """Return where to look: the path of `--socket`, or what the environment says."""
    uid = os.getuid()
    if explicit is not None:
        return Place((explicit.absolute(),), explicit.absolute(), named=True)
    candidates = tuple(path.absolute() for path in client_sockets(env, uid))
    if env.get("LMD_SOCKET"):
        return Place(candidates, candidates[0])
    own = user_socket(env, uid)
    return Place(candidates, own, implicit=None if env.get("LMD_HOME") else own)


def probe(path: Path, *, trust_directory: bool) -> Answer:
    """Connect to *path* once and say what is there.

    Raises:
        Unreachable: the path cannot be a socket's, or whoever listens there is not trusted.
    """
    encoded = os.fsencode(path)
    if len(encoded) > MAX_SOCKET_PATH_BYTES:
        raise Unreachable(
            f"the socket path {path} is {len(encoded)} bytes long, the system allows {MAX_SOCKET_PATH_BYTES}",
            hint="choose a shorter directory with `LMD_HOME`, or a socket with `--socket`",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probing:
        probing.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probing.connect(encoded)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return Answer.ABSENT
        except PermissionError:
            return Answer.FORBIDDEN
        except TimeoutError:
            raise Unreachable(
                f"the daemon at {path} does not accept connections", hint="look at its log, or restart it"
            ) from None
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "an error")
            raise Unreachable(f"cannot connect to {path}: {error.strerror or name}") from error
        credentials = probing.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, server_uid, _ = _UCRED.unpack(credentials)
    _require_trusted(path, server_uid, trust_directory=trust_directory)
    return Answer.LISTENS


def _require_trusted(path: Path, server_uid: int, *, trust_directory: bool) -> None:
    trusted = {0, os.getuid()}
    directory = path.parent.stat()
    if trust_directory:
        trusted.add(directory.st_uid)
    elif directory.st_uid not in trusted or directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        # Who can write there can swap the socket after this look at it.
        raise Unreachable(
            f"others can write to {path.parent}, so `lm` does not trust the socket in it",
            hint=f"`chmod 700 {path.parent}` if it is yours, or name a socket with `--socket`",
        )
    if server_uid not in trusted:
        raise Unreachable(
            f"the socket {path} is served by {_user_name(server_uid)}, who is neither you nor root",
            hint="name the socket with `--socket` if you trust them, or start your own with `lm serve`",
        )


def _user_name(uid: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"uid {uid}"


def find_daemon(place: Place) -> Path | None:
    """Return the first socket where a daemon listens, or None.

    Raises:
        Unreachable: a daemon listens but may not be used: it is not trusted, or the user lacks permission.
    """
    forbidden = None
    for path in place.candidates:
        answer = probe(path, trust_directory=path != place.implicit)
        if answer is Answer.LISTENS:
            return path
        if answer is Answer.FORBIDDEN:
            forbidden = path
    if forbidden is not None:
        raise Unreachable(
            f"you may not use the daemon at {forbidden}",
            hint="ask an administrator for `usermod -aG lmd $USER` and log in again, or start your own with `lm serve`",
        )
    return None


def not_running(place: Place) -> Unreachable:
    """Return the error for `--no-start` and for commands that need a running daemon."""
    paths = " or ".join(str(path) for path in place.candidates)
    if place.named:
        return Unreachable(f"no daemon answers at {paths}", hint="check the path, or start that daemon")
    if SYSTEM_SOCKET in place.candidates:
        hint = "see `systemctl status lmd` for the system's daemon, or start your own with `lm serve`"
    else:
        hint = "start one with `lm serve`"
    return Unreachable(f"no daemon answers at {paths}", hint=hint)
