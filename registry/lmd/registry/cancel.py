"""Ending the blocking calls of one pull from another thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from lmd.registry.errors import PullCancelled

#: How long a watcher outlives its scope. Cancelling is not delayed by it: setting the event wakes the watcher.
_WATCH_S = 0.25


class CancelScope:
    """Ties sockets and waits to a cancel event: when it is set, they end at once.

    A thread in recv() does not see an event, so a watcher thread shuts the sockets down, which wakes it. Callers
    translate the errors that follow with `check`. Thread-safe.
    """

    def __init__(self, event: threading.Event) -> None:
        self._event = event
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._callbacks: list[Callable[[], None]] = []
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def cancelled(self) -> bool:
        """Whether the event is set."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise PullCancelled once the event is set."""
        if self._event.is_set():
            raise PullCancelled

    def wait(self, timeout_s: float) -> None:
        """Sleep, at most until the event is set.

        Raises:
            PullCancelled: the event is or gets set.
        """
        if self._event.wait(timeout_s):
            raise PullCancelled

    def add(self, sock: socket.socket) -> None:
        """Shut *sock* down when the event is set; at once when it is set already."""
        with self._lock:
            self._sockets.add(sock)
            self._watch()
        if self._event.is_set():
            _shut(sock)

    def discard(self, sock: socket.socket) -> None:
        """Leave *sock* alone from now on."""
        with self._lock:
            self._sockets.discard(sock)

    def call(self, callback: Callable[[], None]) -> None:
        """Call *callback* from the watcher's thread when the event is set."""
        with self._lock:
            self._callbacks.append(callback)
            self._watch()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def __enter__(self) -> CancelScope:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self) -> None:
        if self._watcher is None and not self._closed.is_set():
            self._watcher = threading.Thread(target=self._run, name="lmd-cancel", daemon=True)
            self._watcher.start()

    def _run(self) -> None:
        while not self._event.wait(_WATCH_S):
            if self._closed.is_set():
                return
        with self._lock:
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()
        # A socket can be in the middle of its handshake, where shutdown comes too early to last: repeat.
        while not self._closed.is_set():
            with self._lock:
                sockets = list(self._sockets)
            for sock in sockets:
                _shut(sock)
            if not sockets:
                return
            time.sleep(0.02)


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        # Not SSLSocket.shutdown: that drops the TLS layer, and the reader would then see ciphertext as data.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
