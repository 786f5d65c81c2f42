"""Where the API is served: the socket paths that daemon and clients agree on.

`LMD_HOME` moves everything under one directory. Without it there are two places: one daemon for the whole machine,
and one for each user who has no such daemon.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SYSTEM_SOCKET = Path("/run/lmd/lmd.sock")

#: sun_path holds 108 bytes, the terminating zero included (unix(7)).
MAX_SOCKET_PATH_BYTES = 107


def user_runtime_dir(env: Mapping[str, str], uid: int) -> Path:
    """Return the directory for a user's sockets: a per-login tmpfs, or a private directory below /tmp."""
    base = env.get("XDG_RUNTIME_DIR", "")
    if base and os.path.isabs(base):
        return Path(base) / "lmd"
    return Path("/tmp") / f"lmd-{uid}"  # noqa: S108 - created 0700 and checked for its owner before use


def home_socket(home: Path) -> Path:
    """Return the socket of a daemon whose files all live under *home*."""
    return home / "run" / "lmd.sock"


def user_socket(env: Mapping[str, str], uid: int) -> Path:
    """Return the socket of the daemon that a user starts."""
    home = env.get("LMD_HOME", "")
    if home:
        return home_socket(Path(home).absolute())
    return user_runtime_dir(env, uid) / "lmd.sock"


def client_sockets(env: Mapping[str, str], uid: int) -> list[Path]:
    """Return the sockets a client tries, in order: `LMD_SOCKET`, or `LMD_HOME`'s, or the system's then the user's."""
    explicit = env.get("LMD_SOCKET", "")
    if explicit:
        return [Path(explicit)]
    if env.get("LMD_HOME"):
        return [user_socket(env, uid)]
    return [SYSTEM_SOCKET, user_socket(env, uid)]
