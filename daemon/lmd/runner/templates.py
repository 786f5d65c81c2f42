"""Has chat templates rendered by a child process, without ever waiting for it."""

from __future__ import annotations

import collections
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from lmd.runner.wire import Wire, WireClosed, WireError, frame

# The child says hello once Python and jinja2 are imported; on a busy machine that takes a while.
_START_TIMEOUT_S = 30.0

# Stands in for a request that was taken back while the child was busy with it.
_CANCELLED = -1


@dataclass(frozen=True, slots=True)
class TemplateSetup:
    """A template with what it needs to know and its limits."""

    template: str
    bos_token: str
    eos_token: str
    max_bytes: int
    timeout_s: float

    def to_json(self) -> bytes:
        """Return the first frame of the child."""
        return json.dumps(
            {
                "template": self.template,
                "bos_token": self.bos_token,
                "eos_token": self.eos_token,
                "max_bytes": self.max_bytes,
            }
        ).encode()


@dataclass(frozen=True, slots=True)
class Rendered:
    """The outcome for one request: the prompt, or why there is none."""

    request_id: int
    prompt: bytes
    error: str


class _State(Enum):
    ABSENT = auto()
    STARTING = auto()
    COMPILING = auto()
    IDLE = auto()
    RENDERING = auto()


class TemplateClient:
    """Renders one chat after the other in a child process that is started at the first and kept.

    A child that exceeds its time is killed, the request it was busy with fails, and the next one gets a new child. Not
    thread-safe; call `advance` when the descriptor is ready or `deadline` has passed.

    Attributes:
        generation: counts the children; a new one may have the descriptor number of the last.
    """

    def __init__(self, setup: TemplateSetup) -> None:
        self._setup = setup
        self._waiting: collections.deque[tuple[int, bytes]] = collections.deque()
        self._state = _State.ABSENT
        self._deadline: float | None = None
        self._wire: Wire | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: list[subprocess.Popen[bytes]] = []
        self._outgoing = b""
        self._broken = ""
        self.generation = 0

    def fileno(self) -> int | None:
        """Return the descriptor to wait on, None while there is no child."""
        return None if self._wire is None else self._wire.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether the descriptor is to be watched for room to write."""
        return self._wire is not None and (bool(self._outgoing) or self._wire.unsent_bytes > 0)

    @property
    def deadline(self) -> float | None:
        """The `time.monotonic()` at which to call `advance` even if nothing happens."""
        return self._deadline

    @property
    def pending(self) -> int:
        """Requests that are not rendered yet."""
        return sum(request_id != _CANCELLED for request_id, _ in self._waiting)

    def submit(self, request_id: int, chat: bytes) -> None:
        """Queue a serialized `Chat`."""
        self._waiting.append((request_id, chat))

    def cancel(self, request_id: int) -> bool:
        """Take a request back; return whether it was here.

        One that is being rendered goes on to the end of its time: a new child would cost more.
        """
        for index, (waiting_id, chat) in enumerate(self._waiting):
            if waiting_id == request_id:
                if index == 0 and self._state is _State.RENDERING:
                    self._waiting[0] = (_CANCELLED, chat)
                else:
                    del self._waiting[index]
                return True
        return False

    def advance(self) -> Iterator[Rendered]:
        """Do what can be done now; yield the requests that are decided."""
        self._reap()
        if self._waiting and self._state is _State.ABSENT and not self._broken:
            self._start()
        try:
            yield from self._exchange()
        except (WireClosed, WireError):
            yield from self._give_up("its process died; it may have used too much memory")
        due = self._deadline is not None and time.monotonic() >= self._deadline
        if due and self._state is not _State.ABSENT:
            limit_s = _START_TIMEOUT_S if self._state is _State.STARTING else self._setup.timeout_s
            yield from self._give_up(f"it takes longer than {limit_s:g} s")
        while self._broken and self._waiting:
            yield from self._give_up(self._broken)

    def close(self) -> None:
        """End the child."""
        self._stop()
        for process in self._ended:
            process.wait()

    def _exchange(self) -> Iterator[Rendered]:
        if self._wire is None:
            return
        for answer in self._wire.receive():
            yield from self._answered(answer[:1], answer[1:])
            if self._wire is None:
                return
        if self._state is _State.IDLE and self._waiting:
            self._ask(_State.RENDERING, self._waiting[0][1])
        self._wire.flush()

    def _answered(self, tag: bytes, body: bytes) -> Iterator[Rendered]:
        from_template = self._state in (_State.COMPILING, _State.RENDERING)
        error = "" if tag == b"P" else body.decode(errors="replace")
        if self._state is _State.STARTING:
            self._ask(_State.COMPILING, self._setup.to_json())
        elif error and self._state is _State.COMPILING:
            yield from self._give_up(error)
        elif from_template:
            if self._state is _State.RENDERING:
                request_id, _ = self._waiting.popleft()
                if request_id != _CANCELLED:
                    yield Rendered(request_id, b"" if error else body, error)
            self._state = _State.IDLE
            self._deadline = None

    def _ask(self, state: _State, data: bytes) -> None:
        self._state = state
        self._outgoing = frame(data)
        self._deadline = time.monotonic() + self._setup.timeout_s

    def _next_bytes(self, _limit: int) -> bytes:
        data, self._outgoing = self._outgoing, b""
        return data

    def _give_up(self, error: str) -> Iterator[Rendered]:
        """End the child and fail the request it was for: the oldest.

        A template that does not compile never will, so there is no other child after that.
        """
        if self._state is _State.COMPILING:
            self._broken = error
        self._stop()
        if self._waiting:
            request_id, _ = self._waiting.popleft()
            if request_id != _CANCELLED:
                yield Rendered(request_id, b"", error)
        if self._waiting:
            # The caller waits for events, and without a child there would be none.
            self._deadline = time.monotonic()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this program's own interpreter
                [sys.executable, "-P", "-m", "lmd.runner.render", "--fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._wire = Wire(ours, self._next_bytes)
        self.generation += 1
        self._state = _State.STARTING
        self._deadline = time.monotonic() + _START_TIMEOUT_S

    def _stop(self) -> None:
        if self._wire is not None:
            self._wire.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._ended.append(self._process)
        self._wire = self._process = self._deadline = None
        self._outgoing = b""
        self._state = _State.ABSENT

    def _reap(self) -> None:
        self._ended = [process for process in self._ended if process.poll() is None]
