"""Shared fixtures: no test touches the user's files or leaves the machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

#: Variables that would reach the daemon from the shell or the service manager that runs the tests.
_OF_THE_PRODUCT = (
    "CREDENTIALS_DIRECTORY",
    "HF_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "LISTEN_",
    "LMD_",
    "NOTIFY_SOCKET",
    "NO_PROXY",
    "WATCHDOG_",
    "XDG_RUNTIME_DIR",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)


@pytest.fixture(autouse=True)
def lmd_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point every place of the product at a fresh directory."""
    home = tmp_path_factory.mktemp("h")
    monkeypatch.setenv("LMD_HOME", str(home))
    for name in [*os.environ]:
        if name.startswith(_OF_THE_PRODUCT) and name != "LMD_HOME":
            monkeypatch.delenv(name)
    # Daemons of several tests run at once, beside one that the user may have.
    monkeypatch.setenv("LMD_HTTP_LISTEN", "127.0.0.1:0")
    return home


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that would leave the machine."""
    real_connect = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])  # type: ignore[index]
            if not host.startswith("127.") and host not in ("::1", "::ffff:127.0.0.1", "localhost"):
                pytest.fail(f"test tried to reach {host}")
        real_connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)
    return
