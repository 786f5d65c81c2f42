"""What the streams of chats and completions have in common: what comes beside the answer, and how they fail."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import structlog

from lmd.daemon.http.openai.errors import error_event
from lmd.daemon.http.progress import waiting_comment
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import LmdError

log = structlog.get_logger(__name__)

#: How long a stream holds back what it could tell about waiting. Once a stream has begun its status is 200, whatever
#: comes; most failures, such as a prompt that is too long for a model still to be loaded, come sooner, with theirs.
TELL_AFTER_S = 2.0


class WaitingComments:
    """Tells of waiting in comments, which clients skip, and which keep proxies from giving up."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock() + TELL_AFTER_S
        #: The place in the queue where the request began to wait; None when it did not.
        self.first_position: int | None = None

    def of(self, waiting: Waiting) -> bytes:
        """Return the comment, empty while it is too early for one."""
        if self.first_position is None:
            self.first_position = waiting.queue_position
        if self._clock() < self._begin:
            return b""
        return waiting_comment(waiting)


async def told_errors(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yield what *chunks* yields; an error after the first chunk becomes the last event, one before it is raised."""
    begun = False
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk
                begun = True
        except Exception as error:  # the boundary: the status is out, so the stream itself has to tell
            if not begun:
                raise
            yield error_event(error if isinstance(error, LmdError) else _defect(error))


def _defect(error: Exception) -> LmdError:
    error_id = secrets.token_hex(6)
    log.error("http_stream_failed", error_id=error_id, exc_info=error)
    return LmdError(f"internal error in the daemon; its log has more under error_id {error_id}")
