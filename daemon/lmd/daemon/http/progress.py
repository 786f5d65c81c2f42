"""What answers tell beside their standard fields: in headers, comments and one extra object that clients ignore."""

from __future__ import annotations

import time
from collections.abc import Callable

from lmd.daemon.answer_events import Done
from lmd.daemon.residency.values import Waiting

#: Tokens of the prompt that were reused from the prefix cache.
CACHED_TOKENS_HEADER = "X-Lmd-Prompt-Tokens-Cached"
#: Messages and tokens that the context policy dropped.
DROPPED_MESSAGES_HEADER = "X-Lmd-Dropped-Messages"
DROPPED_TOKENS_HEADER = "X-Lmd-Dropped-Tokens"
#: The place in the queue where the request began to wait.
QUEUE_POSITION_HEADER = "X-Lmd-Queue-Position"
#: The extra object in the last message of an answer.
EXTRA_KEY = "lmd"
#: How long a stream holds back what it could tell about waiting. Once a stream has begun its status is 200, whatever
#: comes; most failures, such as a prompt that is too long for a model still to be loaded, come sooner, with theirs.
TELL_AFTER_S = 2.0


def waiting_comment(waiting: Waiting) -> bytes:
    """Return why an answer does not begin yet as a comment of an event stream, which clients skip."""
    if waiting.load_fraction is not None:
        return b": loading %d %%\n\n" % int(waiting.load_fraction * 100)
    return b": queue position %d\n\n" % waiting.queue_position


def done_headers(done: Done, *, queue_position: int | None = None) -> dict[str, str]:
    """Return the headers of an answer that is sent whole; *queue_position* is where it first waited, if it did."""
    headers = {CACHED_TOKENS_HEADER: str(done.cached_tokens)}
    if done.dropped_messages:
        headers[DROPPED_MESSAGES_HEADER] = str(done.dropped_messages)
    if done.dropped_tokens:
        headers[DROPPED_TOKENS_HEADER] = str(done.dropped_tokens)
    if queue_position is not None:
        headers[QUEUE_POSITION_HEADER] = str(queue_position)
    return headers


def done_extra(done: Done) -> dict[str, int]:
    """Return the object that stands under `EXTRA_KEY`; durations are nanoseconds, as in Ollama."""
    return {
        "cached_tokens": done.cached_tokens,
        "dropped_messages": done.dropped_messages,
        "dropped_tokens": done.dropped_tokens,
        "shifted_tokens": done.shifted_tokens,
        "drafted_tokens": done.drafted_tokens,
        "accepted_tokens": done.accepted_tokens,
        "queue_duration": done.queue_ns,
    }


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
