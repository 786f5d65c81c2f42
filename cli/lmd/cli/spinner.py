"""One line on stderr that says what is being waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from lmd.cli.live import LiveRegion
from lmd.cli.output import shorten
from lmd.cli.terminal import can_redraw, palette_for, progress_wanted, terminal_size
from lmd.v1 import inference_service_pb2 as inference_pb
from lmd.v1 import runtime_service_pb2 as runtime_pb

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_FRAME_S = 0.1
#: Answers that come at once should not flash a spinner.
_QUIET_S = 0.15


class Spinner:
    """A moving mark and a few words, there while something is slow. Silent unless *stream* can be drawn over."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        stream = stream or sys.stderr
        self.visible = can_redraw(stream) and progress_wanted()
        self._clock = clock
        self._region = LiveRegion(stream)
        self._palette = palette_for(stream)
        self._started = clock()
        self._text = ""

    def say(self, text: str) -> None:
        """Show *text* beside the mark."""
        self._text = text
        self.refresh()

    def refresh(self) -> None:
        """Move the mark."""
        waited = self._clock() - self._started
        if self.visible and waited >= _QUIET_S:
            frame = _FRAMES[int(waited / _FRAME_S) % len(_FRAMES)]
            text = shorten(self._text, terminal_size().columns - 3)
            self._region.draw([f"{self._palette.hint(frame)} {self._palette.faint(text)}"])

    def clear(self) -> None:
        """Take the line away."""
        self._region.clear()


def load_text(model: str, load: runtime_pb.LoadProgress) -> str:
    """Return what a load is doing."""
    share = f" {load.fraction:.0%}" if load.fraction > 0 else ""
    detail = f", {load.detail}" if load.detail else ""
    return f"loading {model}{share}{detail}"


def waiting_text(model: str, waiting: inference_pb.Waiting) -> str:
    """Return why there is no text yet."""
    if waiting.HasField("load"):
        return load_text(model, waiting.load)
    if waiting.queue_position:
        others = "1 request" if waiting.queue_position == 1 else f"{waiting.queue_position} requests"
        return f"waiting, {others} before this one"
    return ""
