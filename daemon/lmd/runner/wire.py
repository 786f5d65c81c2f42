"""Length-prefixed frames over a non-blocking stream socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

MAX_FRAME_BYTES = 64 << 20
"""A longer frame ends the connection: the other side is broken or hostile."""

_LENGTH = struct.Struct(">I")
_READ_BYTES = 256 << 10
_WRITE_BYTES = 256 << 10


class WireClosed(Exception):
    """Raised when the other side is gone."""


class WireError(Exception):
    """Raised when the other side breaks the protocol."""


class Wire:
    """One end of a connection that carries frames both ways and never blocks.

    Not thread-safe. `refill` is asked for the next bytes to write whenever the last ones are on their way; that lets
    an owner decide late what to send.
    """

    def __init__(self, connection: socket.socket, refill: Callable[[int], bytes]) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._refill = refill
        self._incoming = bytearray()
        self._outgoing = memoryview(b"")

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    @property
    def unsent_bytes(self) -> int:
        """Bytes already handed over by the owner but not taken by the kernel."""
        return len(self._outgoing)

    def receive(self) -> list[bytes]:
        """Return the frames that have arrived, at most about a megabyte of small ones at a time.

        Raises:
            WireClosed: end of file, once all whole frames before it were returned.
            WireError: a frame is too long.
        """
        frames: list[bytes] = []
        for _ in range(4):
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except ConnectionError as error:
                raise WireClosed from error
            if not data:
                if not frames:
                    raise WireClosed
                break
            self._incoming += data
            self._take_frames(frames)
            if len(data) < _READ_BYTES:
                break
        return frames

    def _take_frames(self, frames: list[bytes]) -> None:
        buffer, start = self._incoming, 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame of {length} bytes, {MAX_FRAME_BYTES} are allowed")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            frames.append(bytes(memoryview(buffer)[start + _LENGTH.size : end]))
            start = end
        if start:
            del buffer[:start]

    def flush(self) -> bool:
        """Write what the kernel takes; return whether everything is out.

        Raises:
            WireClosed: the other side does not read any more.
        """
        while True:
            if not self._outgoing:
                data = self._refill(_WRITE_BYTES)
                if not data:
                    return True
                self._outgoing = memoryview(data)
            try:
                sent = self._socket.send(self._outgoing)
            except BlockingIOError:
                return False
            except ConnectionError as error:
                raise WireClosed from error
            self._outgoing = self._outgoing[sent:]


def frame(data: bytes) -> bytes:
    """Return *data* with its length before it."""
    return _LENGTH.pack(len(data)) + data


def read_frame(connection: socket.socket) -> bytes:
    """Read one frame from a blocking socket.

    Raises:
        WireClosed: end of file.
        WireError: the frame is too long.
    """
    (length,) = _LENGTH.unpack(_read_exactly(connection, _LENGTH.size))
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {length} bytes, {MAX_FRAME_BYTES} are allowed")
    return _read_exactly(connection, length)


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), _READ_BYTES))
        if not part:
            raise WireClosed
        data += part
    return bytes(data)
