"""One request that a runner serves, as its consumer sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lmd.daemon.errors import ContextLengthExceeded, EngineFailed, TemplateFailed, Unloaded
from lmd.registry.errors import CapabilityMissing, InvalidRequest, LmdError
from lmd.runner.v1 import frames_pb2 as frames


class Answer:
    """The stream of one request: text, then exactly one end.

    Text that the consumer has not taken yet is merged, so a slow consumer gets fewer, larger pieces and never slows
    the runner; what can pile up is one answer, which the context bounds. One consumer.
    """

    __slots__ = ("_cancel", "_changed", "_text", "_tokens", "error", "finished", "request_id", "started")

    def __init__(self, request_id: int, cancel: Callable[[int], None]) -> None:
        self.request_id = request_id
        #: Set when the request got a slot.
        self.started: frames.Started | None = None
        #: Set when the request is done; then no more text follows what `take` returns.
        self.finished: frames.Finished | None = None
        #: Set when the request failed; text that came before can still be taken.
        self.error: LmdError | None = None
        self._cancel = cancel
        self._text: list[str] = []
        self._tokens = 0
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the runner is done with the request."""
        return self.finished is not None or self.error is not None

    async def changed(self) -> None:
        """Wait until there is text or an end to take, or the request got a slot."""
        await self._changed.wait()
        self._changed.clear()

    def take(self) -> tuple[str, int]:
        """Return the text that came since the last call ("" for none) and the tokens generated so far."""
        text = "".join(self._text)
        self._text.clear()
        return text, self._tokens

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
        self._text.append(delta.text)
        self._tokens = delta.generated_tokens
        self._changed.set()

    def note_finished(self, finished: frames.Finished) -> None:
        """Receive the end."""
        self.finished = finished
        self._changed.set()

    def note_error(self, error: LmdError) -> None:
        """Receive the failure."""
        self.error = error
        self._changed.set()


def error_of(failed: frames.Failed, *, name: str, log: str) -> LmdError:
    """Return the domain error for a request that a runner of model *name* failed."""
    match failed.kind:
        case frames.Failed.KIND_CONTEXT_LENGTH:
            return ContextLengthExceeded(prompt_tokens=failed.prompt_tokens, context_tokens=failed.context_tokens)
        case frames.Failed.KIND_TEMPLATE:
            return TemplateFailed(failed.message)
        case frames.Failed.KIND_NO_TEMPLATE:
            return CapabilityMissing(name, "chat")
        case frames.Failed.KIND_INVALID:
            return InvalidRequest(failed.message, field="prompt")
        case frames.Failed.KIND_CANCELLED:
            # Nobody waits for the end of what we took back; otherwise a runner that drains took it back by itself.
            return Unloaded(name)
        case _:
            return EngineFailed(name, failed.message, log=log)
