"""The daemon's end of the socketpair to a runner: frames in, frames out.

A frame is a 4-byte big-endian length and that many bytes of protobuf; see frames.proto.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

from google.protobuf.message import DecodeError

from lmd.runner.v1 import frames_pb2 as frames

#: Longer frames end the connection; a length is read before its bytes, so a liar costs nothing.
MAX_FRAME_BYTES = 64 << 20

_LENGTH = struct.Struct(">I")


class RunnerLink(asyncio.Protocol):
    """Parses what the runner sends as it arrives and calls *on_frame* for each frame, in order, on the event loop.

    *on_end* is called once when nothing more will come, with what was wrong with the bytes, or with None when the
    other side just closed. Frames are handled where they are parsed: no task switch per token.
    """

    def __init__(self, on_frame: Callable[[frames.RunnerFrame], None], on_end: Callable[[str | None], None]) -> None:
        self._on_frame = on_frame
        self._on_end = on_end
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._fault: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Handle every frame that is complete now."""
        if self._fault is not None:
            return
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                self._break(f"a frame of {length} bytes")
                return
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            try:
                frame = frames.RunnerFrame.FromString(bytes(buffer[start + _LENGTH.size : end]))
            except DecodeError:
                self._break("a frame that does not parse")
                return
            self._on_frame(frame)
            start = end
        del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that nothing more comes."""
        self._writable.set()
        self._on_end(self._fault)

    def pause_writing(self) -> None:
        """Note that the runner does not read as fast as we write."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Note that the runner has caught up."""
        self._writable.set()

    def send(self, frame: frames.DaemonFrame) -> None:
        """Queue a frame; a link that is closing drops it, its end is reported by *on_end*."""
        if self._transport is None or self._transport.is_closing():
            return
        data = frame.SerializeToString()
        self._transport.write(_LENGTH.pack(len(data)) + data)

    async def writable(self) -> None:
        """Wait until the runner has read enough of what was sent."""
        await self._writable.wait()

    def close(self) -> None:
        """Close the link, without waiting for what has not been sent."""
        if self._transport is not None:
            self._transport.abort()

    def _break(self, fault: str) -> None:
        self._fault = fault
        self._buffer.clear()
        self.close()
