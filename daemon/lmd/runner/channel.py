"""The runner's end of the connection to the daemon."""

from __future__ import annotations

import collections
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from lmd.runner.answer_parser import Call, Part
from lmd.runner.v1 import frames_pb2
from lmd.runner.wire import Wire, WireError, frame

_BACKLOG_LIMIT_BYTES = 4 << 20
# Nobody reads faster than this; each message costs the processors that compute the next token about 0.6 ms.
_PACE_S = 0.025


@dataclass(slots=True)
class _Text:
    """Text of one answer that is not serialized yet: more can still be added."""

    request_id: int
    choice: int
    parts: list[str] = field(default_factory=list)
    logprobs: list[frames_pb2.TokenLogprob] = field(default_factory=list)
    generated_tokens: int = 0
    size_bytes: int = 0
    thoughts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def takes(self, part: Part) -> bool:
        """Tell whether *part* can be added: in a delta thoughts come before text, and calls after it."""
        if part.thinking:
            return not self.calls and not any(self.parts)
        return part.call is not None or not self.calls

    def add(self, part: Part) -> int:
        """Add a part of an answer; return its size, roughly in bytes."""
        if part.call is not None:
            self.calls.append(part.call)
            return len(part.call.name) + len(part.call.arguments)
        (self.thoughts if part.thinking else self.parts).append(part.thinking or part.text)
        return len(part.thinking or part.text)

    def note(self, size_bytes: int, generated_tokens: int) -> None:
        """Count what was added."""
        self.size_bytes += size_bytes
        self.generated_tokens = generated_tokens

    def delta(self) -> frames_pb2.Delta:
        """Return the frame."""
        return frames_pb2.Delta(
            request_id=self.request_id,
            choice=self.choice,
            text="".join(self.parts),
            generated_tokens=self.generated_tokens,
            logprobs=self.logprobs,
            thinking="".join(self.thoughts),
            tool_calls=[frames_pb2.ToolCall(name=call.name, arguments=call.arguments) for call in self.calls],
        )


class Channel:
    """Sends frames without ever blocking, and receives them.

    While the daemon reads slower than the engine writes, the texts of one answer grow together into one `Delta`, so
    what waits here is bounded by the requests that run, and `congested` tells the engine to start no more of them.
    Frames of one request keep their order. Not thread-safe.

    Texts after the first of an answer are also held back for up to 25 milliseconds to share a frame with the next ones:
    a fast engine would otherwise spend more on messages than on tokens. Everything else goes out at the next `flush`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._wire = Wire(connection, self._next_bytes)
        self._outbox: collections.deque[bytes | _Text] = collections.deque()
        self._open_texts: dict[tuple[int, int], _Text] = {}
        #: Answers of which something was queued.
        self._begun: set[tuple[int, int]] = set()
        self._waiting_bytes = 0
        self._urgent = False
        self._blocked = False
        self._flushed_at = 0.0

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._wire.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self._outbox) or self._wire.unsent_bytes > 0

    @property
    def blocked(self) -> bool:
        """Whether the last `flush` found no room for all it had."""
        return self._blocked

    @property
    def congested(self) -> bool:
        """Whether so much waits that no new work should start."""
        return self._waiting_bytes + self._wire.unsent_bytes > _BACKLOG_LIMIT_BYTES

    def receive(self) -> list[frames_pb2.DaemonFrame]:
        """Return the frames that have arrived.

        Raises:
            WireClosed: the daemon is gone.
            WireError: it sent something that is not a frame.
        """
        try:
            return [frames_pb2.DaemonFrame.FromString(data) for data in self._wire.receive()]
        except DecodeError as error:
            raise WireError("a frame that does not parse") from error

    def send(self, message: frames_pb2.RunnerFrame, *, last_of: int | None = None) -> None:
        """Queue a frame. *last_of* names the request that it ends."""
        if last_of is not None:
            for key in [key for key in self._begun if key[0] == last_of]:
                self._begun.remove(key)
                self._open_texts.pop(key, None)
        data = frame(message.SerializeToString())
        self._waiting_bytes += len(data)
        self._outbox.append(data)
        self._urgent = True

    def send_text(
        self,
        request_id: int,
        choice: int,
        text: str | Sequence[Part],
        generated_tokens: int,
        logprobs: Sequence[frames_pb2.TokenLogprob] = (),
    ) -> None:
        """Queue text of an answer, or parts of it."""
        pending = self._open_text(request_id, choice)
        size_bytes = 0
        if isinstance(text, str):
            pending.parts.append(text)
            size_bytes = len(text)
        else:
            for part in text:
                if not pending.takes(part):
                    pending.note(size_bytes, generated_tokens)
                    self._waiting_bytes += size_bytes
                    size_bytes = 0
                    del self._open_texts[request_id, choice]
                    pending = self._open_text(request_id, choice)
                size_bytes += pending.add(part)
        if logprobs:
            pending.logprobs.extend(logprobs)
            size_bytes += sum(report.ByteSize() for report in logprobs)
        pending.note(size_bytes, generated_tokens)
        self._waiting_bytes += size_bytes

    def _open_text(self, request_id: int, choice: int) -> _Text:
        """Return the text of an answer that more can be added to."""
        pending = self._open_texts.get((request_id, choice))
        if pending is None:
            pending = self._open_texts[request_id, choice] = _Text(request_id, choice)
            self._outbox.append(pending)
            # The first text of an answer is what somebody waits for; markers of thoughts may have come before it.
            self._urgent |= (request_id, choice) not in self._begun
            self._begun.add((request_id, choice))
        return pending

    def flush(self, *, now: bool = True) -> None:
        """Write what the kernel takes; with *now* false, only when something is urgent or has waited long enough.

        Raises:
            WireClosed: the daemon is gone.
        """
        if not self._outbox and not self._wire.unsent_bytes:
            return
        clock = time.monotonic()
        if now or self._urgent or clock - self._flushed_at >= _PACE_S:
            self._urgent = False
            self._flushed_at = clock
            self._blocked = not self._wire.flush()

    def _next_bytes(self, limit: int) -> bytes:
        """Serialize the oldest frames, about *limit* bytes of them."""
        data = bytearray()
        while self._outbox and len(data) < limit:
            item = self._outbox.popleft()
            if isinstance(item, bytes):
                self._waiting_bytes -= len(item)
                data += item
                continue
            key = item.request_id, item.choice
            if self._open_texts.get(key) is item:
                del self._open_texts[key]
            self._waiting_bytes -= item.size_bytes
            data += frame(frames_pb2.RunnerFrame(delta=item.delta()).SerializeToString())
        return bytes(data)
