"""Tells systemd how the daemon is doing.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends state to the service manager; without one, does nothing."""

    def __init__(self, env: Mapping[str, str]) -> None:
        """Read where to send from *env*: NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID."""
        address = env.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the zero byte of an abstract name.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        ours = env.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        usec = env.get("WATCHDOG_USEC", "")
        #: How often to call `alive`, in seconds: half of what the manager allows. None when it does not watch.
        self.watchdog_interval_s = int(usec) / 2e6 if usec.isdecimal() and int(usec) and ours else None

    def ready(self, status: str) -> None:
        """Say that the daemon serves."""
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self, status: str, *, within_s: float) -> None:
        """Say that the daemon stops, and how long it may take."""
        self._send(f"STOPPING=1\nSTATUS={status}\nEXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")

    def alive(self) -> None:
        """Keep the watchdog quiet."""
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        # A manager that went away is no reason to stop serving.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), self._address)
