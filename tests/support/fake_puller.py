"""A puller whose transfers do what the test tells them, step by step."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable

from lmd.registry.digest import Digest
from lmd.registry.errors import PullCancelled
from lmd.registry.pull import PullEvent, PullState
from lmd.registry.ref import ModelRef
from lmd.registry.store import TagRecord

DEADLINE_S = 20.0


def progress(
    filename: str,
    completed_bytes: int,
    total_bytes: int = 100,
    state: PullState = PullState.DOWNLOADING,
    resumed_bytes: int = 0,
) -> PullEvent:
    return PullEvent(
        digest=str(Digest.of(filename.encode())),
        filename=filename,
        completed_bytes=completed_bytes,
        total_bytes=total_bytes,
        state=state,
        resumed_bytes=resumed_bytes,
        detail="",
    )


class Transfer:
    """One call of `pull`, waiting in its thread for the test's next instruction."""

    def __init__(
        self, ref: ModelRef, token: str | None, on_event: Callable[[PullEvent], None], cancelled: threading.Event
    ) -> None:
        self.ref = ref
        self.token = token
        self.cancelled = cancelled
        self.done = threading.Event()
        self._on_event = on_event
        self._steps: queue.SimpleQueue[PullEvent | TagRecord | BaseException] = queue.SimpleQueue()

    def report(self, *events: PullEvent) -> None:
        for event in events:
            self._steps.put(event)

    def succeed(self, tag: TagRecord | None = None) -> None:
        """End with *tag*, or one that points nowhere."""
        self._steps.put(tag or TagRecord(self.ref.name, Digest.of(b"manifest"), 1.0, 1.0))

    def fail(self, error: BaseException) -> None:
        self._steps.put(error)

    def run(self) -> TagRecord:
        try:
            while True:
                if self.cancelled.is_set():
                    raise PullCancelled
                try:
                    step = self._steps.get(timeout=0.005)
                except queue.Empty:
                    continue
                if isinstance(step, PullEvent):
                    self._on_event(step)
                elif isinstance(step, TagRecord):
                    return step
                else:
                    raise step
        finally:
            self.done.set()


class FakePuller:
    """Hands each transfer to the test that waits for it."""

    def __init__(self) -> None:
        self.started = 0
        self._transfers: queue.SimpleQueue[Transfer] = queue.SimpleQueue()

    def pull(
        self,
        ref: ModelRef,
        *,
        token: str | None,
        on_event: Callable[[PullEvent], None],
        cancelled: threading.Event,
    ) -> TagRecord:
        transfer = Transfer(ref, token, on_event, cancelled)
        self.started += 1
        self._transfers.put(transfer)
        return transfer.run()

    async def next_transfer(self) -> Transfer:
        """Wait for the next call of `pull`."""
        return await asyncio.to_thread(self._transfers.get, timeout=DEADLINE_S)
