"""One request that a runner serves, as its consumer sees it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lmd.daemon.answer_events import Delta, TokenLogprob
from lmd.daemon.conversations import ToolCall
from lmd.daemon.deadline import Deadline
from lmd.daemon.errors import ClientStalled, ContextLengthExceeded, EngineFailed, TemplateFailed, Unloaded
from lmd.registry.errors import CapabilityMissing, InvalidRequest, LmdError
from lmd.runner.v1 import frames_pb2 as frames

#: What may wait for a slow consumer, in bytes of frames: some hundred thousand tokens, or twenty thousand with twenty
#: log probabilities each.
MAX_PENDING_BYTES = 8 << 20
#: What one delta may grow to by merging: clients take messages of 4 MiB.
MAX_DELTA_BYTES = 1 << 20


@dataclass(slots=True)
class _Pending:
    """What came of one choice since the consumer took the last of it."""

    choice: int
    size_bytes: int = 0
    texts: list[str] = field(default_factory=list)
    generated_tokens: int = 0
    logprobs: list[frames.TokenLogprob] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    tool_calls: list[frames.ToolCall] = field(default_factory=list)

    def add(self, delta: frames.Delta, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        self.texts.append(delta.text)
        self.generated_tokens = delta.generated_tokens
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs)
        if delta.thinking:
            self.thoughts.append(delta.thinking)
        if delta.tool_calls:
            self.tool_calls.extend(delta.tool_calls)

    def follows(self, delta: frames.Delta) -> bool:
        """Tell whether *delta* can be merged: within one delta thoughts come before text, and calls after it."""
        return not ((delta.thinking and (self.tool_calls or any(self.texts))) or (delta.text and self.tool_calls))

    def merged(self) -> Delta:
        return Delta(
            "".join(self.texts),
            self.generated_tokens,
            self.choice,
            _logprobs(self.logprobs),
            "".join(self.thoughts),
            tuple(ToolCall(_call_id(), call.name, call.arguments) for call in self.tool_calls),
        )


class Answer:
    """The stream of one request: text, then exactly one end.

    What the consumer has not taken yet is merged, choice by choice, so a slow consumer gets fewer, larger pieces and
    never slows the runner. A consumer that leaves more than *max_pending_bytes* is not there any more: the request is
    taken back, and ends with `ClientStalled`. One consumer.
    """

    __slots__ = (
        "_cancel",
        "_changed",
        "_full",
        "_max_pending_bytes",
        "_on_end",
        "_pending",
        "_pending_bytes",
        "deadline",
        "error",
        "finished",
        "request_id",
        "started",
    )

    def __init__(
        self,
        request_id: int,
        cancel: Callable[[int], None],
        deadline: Deadline | None = None,
        *,
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self.request_id = request_id
        self.deadline = deadline or Deadline()
        #: Set when the request got a slot.
        self.started: frames.Started | None = None
        #: Set when the request is done; then no more text follows what `take` returns.
        self.finished: frames.Finished | None = None
        #: Set when the request failed; text that came before can still be taken.
        self.error: LmdError | None = None
        self._cancel = cancel
        self._max_pending_bytes = max_pending_bytes
        self._full: list[_Pending] = []
        self._pending: dict[int, _Pending] = {}
        self._pending_bytes = 0
        self._changed = asyncio.Event()
        self._on_end: Callable[[], None] | None = None

    @property
    def ended(self) -> bool:
        """Whether the request is over, whatever of it is still to be taken."""
        return self.finished is not None or self.error is not None

    async def changed(self) -> None:
        """Wait until there is text or an end to take, or the request got a slot."""
        await self._changed.wait()
        self._changed.clear()

    def take(self) -> list[Delta]:
        """Return what came since the last call, merged into as few deltas as can be."""
        taken = [pending.merged() for pending in (*self._full, *self._pending.values())]
        self._full.clear()
        self._pending.clear()
        self._pending_bytes = 0
        return taken

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call *callback* once, as soon as the request is over: the consumer may take its time with what is left."""
        if self.ended:
            callback()
        else:
            self._on_end = callback

    def close(self) -> None:
        """Leave: what the runner still does for this request is taken back. Idempotent."""
        if not self.ended:
            self._cancel(self.request_id)

    def note_started(self, started: frames.Started) -> None:
        """Receive that the request got a slot."""
        self.started = started
        self._changed.set()

    def note_delta(self, delta: frames.Delta) -> None:
        """Receive text."""
        if self.ended:
            return
        size_bytes = delta.ByteSize()
        self._pending_bytes += size_bytes
        if self._pending_bytes > self._max_pending_bytes:
            self.close()
            self.note_error(ClientStalled(limit_bytes=self._max_pending_bytes))
            return
        pending = self._pending.get(delta.choice)
        if pending is not None and not pending.follows(delta):
            self._full.append(self._pending.pop(delta.choice))
            pending = None
        if pending is None:
            pending = self._pending[delta.choice] = _Pending(delta.choice)
        pending.add(delta, size_bytes)
        if pending.size_bytes > MAX_DELTA_BYTES:
            self._full.append(self._pending.pop(delta.choice))
        self._changed.set()

    def note_finished(self, finished: frames.Finished) -> None:
        """Receive the end."""
        if not self.ended:
            self.finished = finished
            self._end()

    def note_error(self, error: LmdError) -> None:
        """Receive the failure."""
        if not self.ended:
            self.error = error
            self._end()

    def _end(self) -> None:
        self._changed.set()
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end()


def _call_id() -> str:
    return f"call_{secrets.token_hex(8)}"


def _logprobs(tokens: Iterable[frames.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token.id, token.token, token.logprob, _logprobs(token.top)) for token in tokens)


def error_of(failed: frames.Failed, *, name: str, log: str, deadline: Deadline) -> LmdError:
    """Return the domain error for a request that a runner of model *name* failed."""
    match failed.kind:
        case frames.Failed.KIND_CONTEXT_LENGTH:
            return ContextLengthExceeded(prompt_tokens=failed.prompt_tokens, context_tokens=failed.context_tokens)
        case frames.Failed.KIND_TEMPLATE:
            return TemplateFailed(failed.message)
        case frames.Failed.KIND_NO_TEMPLATE:
            return CapabilityMissing(name, "chat")
        case frames.Failed.KIND_CAPABILITY:
            return CapabilityMissing(name, failed.field, hint=failed.message)
        case frames.Failed.KIND_INVALID:
            return InvalidRequest(failed.message, field=failed.field or "prompt")
        case frames.Failed.KIND_DEADLINE:
            return deadline.error()
        case frames.Failed.KIND_CANCELLED:
            # Nobody waits for the end of what we took back; otherwise a runner that drains took it back by itself.
            return Unloaded(name)
        case _:
            return EngineFailed(name, failed.message, log=log)
