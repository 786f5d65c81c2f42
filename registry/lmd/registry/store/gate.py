"""The lock that orders changes of what the store holds and needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """A re-entrant lock with a count of the changes made under it.

    Whoever adds a root, a blob or a reference goes through `change`; garbage collection deletes inside `hold`, and only
    what it marked at the present *generation*. So nothing becomes needed between the decision to delete it and the
    deletion.

    Lock order, outermost first: an ingest's checkpoint lock, the gate, the index. The other locks (of an ingest's
    ranges, of the reservations) are never held while another is taken. Large files are hashed and synced outside all.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.generation = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep others from changing anything."""
        with self._lock:
            yield

    @contextmanager
    def change(self) -> Iterator[None]:
        """Change what is held or needed; whoever decided on the state before has to decide again."""
        with self._lock:
            self.generation += 1
            yield
