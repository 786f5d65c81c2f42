"""Where a daemon keeps things: one directory below `LMD_HOME`, systemd's directories, or the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmd.v1.endpoint import home_socket, user_runtime_dir

#: The group whose members may use the system's daemon.
SOCKET_GROUP = "lmd"


@dataclass(frozen=True, slots=True)
class Dirs:
    """The four directories of a daemon.

    Attributes:
        runtime: sockets and views; gone after a reboot.
        state: the store and what else must last.
        config: the configuration file and the user's aliases.
        log: log files, when there is nobody to read standard error.
    """

    runtime: Path
    state: Path
    config: Path
    log: Path

    @property
    def private(self) -> Path:
        """The directory (0700) that only this daemon enters: the private gRPC socket."""
        return self.runtime / "private"


def resolve_dirs(env: Mapping[str, str], *, uid: int, user_home: Path, home: Path | None) -> Dirs:
    """Choose the directories: below *home* if given, else what systemd made for the unit, else the user's own.

    The user's places follow the XDG base directories. Models count as data, not as state: a daemon started by hand,
    by `lm` or by a user unit finds the same store.

    Source: systemd.exec(5), RuntimeDirectory= and its siblings; XDG Base Directory Specification 0.8.
    """
    if home is not None:
        return Dirs(runtime=home_socket(home).parent, state=home, config=home, log=home / "log")

    def xdg(variable: str, fallback: str) -> Path:
        base = env.get(variable, "")
        return (Path(base) if base.startswith("/") else user_home / fallback) / "lmd"

    def systemd(variable: str) -> Path | None:
        first = env.get(variable, "").split(":")[0]
        return Path(first) if first.startswith("/") else None

    return Dirs(
        runtime=systemd("RUNTIME_DIRECTORY") or user_runtime_dir(env, uid),
        state=systemd("STATE_DIRECTORY") or xdg("XDG_DATA_HOME", ".local/share"),
        config=systemd("CONFIGURATION_DIRECTORY") or xdg("XDG_CONFIG_HOME", ".config"),
        log=systemd("LOGS_DIRECTORY") or xdg("XDG_STATE_HOME", ".local/state") / "log",
    )
