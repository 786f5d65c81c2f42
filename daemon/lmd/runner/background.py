"""Work that would hold the engine up, such as tokenizing a megabyte, done in a thread beside it."""

from __future__ import annotations

import concurrent.futures
import os
import queue
from collections.abc import Callable
from typing import TypeVar

from lmd.runner.v1 import frames_pb2

T = TypeVar("T")

Frames = list[frames_pb2.RunnerFrame]

#: Below this a text is tokenized in well under a step's time; a longer one goes to the thread.
INLINE_BYTES = 32 << 10


class Background:
    """One thread, made at the first piece of work, that takes one piece after the other.

    What comes of a piece is handled on the engine's thread, in `collect`; call that when the descriptor is readable.
    """

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "background")
        self._done: queue.SimpleQueue[Callable[[], Frames]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when something is done."""
        return self._wake

    def run(self, work: Callable[[], T], then: Callable[[T], Frames]) -> None:
        """Call *work* in the thread, and *then* with its result in a later `collect`."""

        def call() -> None:
            try:
                result = work()
            except Exception as error:
                failure = error
                self._done.put(lambda: _raise(failure))
            else:
                self._done.put(lambda: then(result))
            os.eventfd_write(self._wake, 1)

        self._thread.submit(call)

    def collect(self) -> Frames:
        """Return the frames that came of what is done."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return []
        frames: Frames = []
        while not self._done.empty():
            frames += self._done.get()()
        return frames

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _raise(error: Exception) -> Frames:
    """Raise on the engine's thread what is a defect of this program, instead of losing it with the thread."""
    raise error
