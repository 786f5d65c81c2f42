"""Waits until files are written completely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmd.daemon.dropin_scan import FileMark, mark_of
from lmd.daemon.writers import has_writer


@dataclass(frozen=True, slots=True)
class Timing:
    """How long to wait for what, in seconds.

    A file that nobody has open for writing must be as it is for *settle_s*: some tools close and reopen. Where the
    system cannot tell whether somebody writes, it must be so for *blind_settle_s*. Something that failed for a reason
    that may pass is tried again after *rescan_s*, which is also how often the folder is looked at without an event.
    """

    settle_s: float = 1.0
    blind_settle_s: float = 10.0
    rescan_s: float = 60.0


class NotYet(Exception):
    """Raised when something has to wait; *wait_s* is when to look again."""

    def __init__(self, why: str, wait_s: float) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class Settling:
    """Remembers since when files are as they are. For one thread at a time."""

    def __init__(
        self,
        timing: Timing,
        clock: Callable[[], float],
        has_writer: Callable[[Path], bool | None] = has_writer,
    ) -> None:
        self._timing = timing
        self._clock = clock
        self._has_writer = has_writer
        self._since: dict[Path, tuple[FileMark, float]] = {}

    def check(self, paths: Sequence[Path]) -> None:
        """Return when all *paths* are written completely, as far as one can know.

        Raises: NotYet, OSError.
        """
        now = self._clock()
        for path in paths:
            mark = mark_of(path)
            if mark is None:
                raise NotYet(f"{path.name} is not there", self._timing.settle_s)
            writer = self._has_writer(path)
            if writer:
                self._since.pop(path, None)
                # The event of its closing comes earlier than this, where there are events.
                raise NotYet(f"{path.name} is being written", self._timing.blind_settle_s)
            known, since = self._since.setdefault(path, (mark, now))
            if known != mark:
                self._since[path] = (mark, since := now)
            needed_s = self._timing.blind_settle_s if writer is None else self._timing.settle_s
            left_s = since + needed_s - now
            if left_s > 0:
                raise NotYet(f"{path.name} was just written", left_s)

    def forget_missing(self) -> None:
        """Forget files that are gone."""
        self._since = {path: known for path, known in self._since.items() if path.exists()}
