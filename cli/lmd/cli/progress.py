"""Progress of transfers on stderr: bars that redraw on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from lmd.cli.live import LiveRegion
from lmd.cli.meter import Meter
from lmd.cli.output import shorten
from lmd.cli.terminal import (
    can_redraw,
    cell_width,
    one_line,
    palette_for,
    printable,
    progress_wanted,
    terminal_size,
    without_colour,
)
from lmd.cli.units import format_clock, format_size
from lmd.v1 import model_service_pb2 as pb

_REDRAW_S = 0.08
_PLAIN_LINE_S = 5.0
#: A pause that people begin to wonder about; a rate over it would say nothing.
_IDLE_S = 3.0
_WIDEST_BAR = 32
_WIDEST_NAME = 36
_DIGEST_SHOWN = 19  # "sha256:" and twelve digits

State = pb.PullProgress.State
_ENDS = (State.STATE_DONE, State.STATE_PRESENT)


class Reporter(Protocol):
    """Shows the steps of a transfer. Use as a context manager, so that a terminal is left clean."""

    def status(self, text: str) -> None:
        """Say what begins."""

    def progress(self, progress: pb.PullProgress) -> None:
        """Show how far one file is."""

    def refresh(self) -> None:
        """Catch up on the screen, when nothing has come for a while."""

    def close(self) -> None:
        """Show the last state for good."""


@dataclass(slots=True)
class _Step:
    """One file of a transfer as last heard of."""

    label: str
    progress: pb.PullProgress
    moved_at: float
    meter: Meter = field(default_factory=Meter)


class _Steps:
    """The files of a transfer in the order they appeared."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_key: dict[str, _Step] = {}

    def update(self, progress: pb.PullProgress) -> tuple[_Step, bool]:
        """Take *progress* in; also return whether the state of its file changed."""
        key = progress.filename or progress.digest
        step = self._by_key.get(key)
        changed = step is None or step.progress.state != progress.state
        now = self._clock()
        if step is None:
            label = one_line(progress.filename) or progress.digest[:_DIGEST_SHOWN] or "source"
            step = self._by_key[key] = _Step(label, progress, now)
        if changed or progress.completed_bytes != step.progress.completed_bytes:
            step.moved_at = now
        step.progress = progress
        if progress.state == State.STATE_DOWNLOADING:
            step.meter.update(now, progress.completed_bytes)
        return step, changed

    def shown(self) -> list[_Step]:
        """Return what is worth a line: resolving is not, once there are files."""
        steps = list(self._by_key.values())
        return [s for s in steps if s.progress.state != State.STATE_RESOLVING] or steps


class BarReporter:
    """A bar for each file, drawn over in place."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps = _Steps(clock)
        self._region = LiveRegion(stream)
        self._palette = palette_for(stream)
        self._drawn_at = float("-inf")

    def status(self, text: str) -> None:
        """Write *text* above the bars."""
        self._region.draw(self._lines(), above=f"{printable(text)}\n")

    def progress(self, progress: pb.PullProgress) -> None:
        """Redraw, at most about twelve times a second unless a file changed its state."""
        _, changed = self._steps.update(progress)
        if changed:
            self._drawn_at = float("-inf")
        self.refresh()

    def refresh(self) -> None:
        """Redraw, as rates and pauses change also when nothing comes."""
        if self._clock() - self._drawn_at >= _REDRAW_S:
            self._region.draw(self._lines())
            self._drawn_at = self._clock()

    def close(self) -> None:
        """Leave what was reached; what did not begin leaves no line."""
        self._region.clear(above="".join(f"{line}\n" for line in self._lines(last=True)))

    def _lines(self, *, last: bool = False) -> list[str]:
        steps = [step for step in self._steps.shown() if not last or _began(step.progress)]
        columns = terminal_size().columns
        width = min(max((cell_width(s.label) for s in steps), default=0), _WIDEST_NAME, max(columns // 3, 8))
        return [_cut(self._line(step, width, columns, last=last), columns - 1) for step in steps]

    def _line(self, step: _Step, name_width: int, columns: int, *, last: bool) -> str:
        progress, palette = step.progress, self._palette
        name = shorten(step.label, name_width)
        head = f"  {name}{' ' * (name_width - cell_width(name))}  "
        room = columns - cell_width(head) - 1
        if last and progress.state not in _ENDS:
            total = f" of {format_size(progress.total_bytes)}" if progress.total_bytes else ""
            return head + f"{format_size(progress.completed_bytes)}{total}"
        match progress.state:
            case State.STATE_DONE:
                size = format_size(progress.total_bytes or progress.completed_bytes)
                return head + f"{palette.good('done')}  {size}{self._resumed(progress)}"
            case State.STATE_PRESENT:
                return head + palette.faint(f"already here  {format_size(progress.total_bytes)}")
            case State.STATE_COMMITTING:
                return head + "writing to disk"
            case State.STATE_RETRYING:
                return head + palette.warning("retrying") + shorten(f"  {one_line(progress.detail)}", room - 8)
            case State.STATE_RESOLVING:
                return head + palette.faint(shorten(one_line(progress.detail) or "resolving", room))
        return head + self._bar(step, room)

    def _bar(self, step: _Step, room: int) -> str:
        progress, palette, now = step.progress, self._palette, self._clock()
        done, total = progress.completed_bytes, progress.total_bytes
        rate, remaining_s = step.meter.rate(now), step.meter.remaining_s(now, total)
        pace = f"{format_size(rate)}/s" if rate is not None else ""
        clock = format_clock(remaining_s) if remaining_s is not None else ""
        idle_s = now - step.moved_at
        speed = f"{pace:>12}  {clock:>5}" if idle_s < _IDLE_S else f"{f'no data for {int(idle_s)}s':>19}"
        if not total:
            return f"{format_size(done)}  {speed.strip()}"[:room]
        share = min(done / total, 1.0)
        figures = f"{int(share * 100):3}%  {format_size(done):>8} / {format_size(total)}  {speed}"
        width = min(room - len(figures) - 2, _WIDEST_BAR)
        if width < 6:
            return f"{int(share * 100):3}%  {speed}"[:room]
        filled = int(share * width)
        bar = palette.hint("━" * filled) + palette.faint("─" * (width - filled))
        return f"{bar}  {figures}{self._resumed(progress, room - width - len(figures) - 2)}"

    def _resumed(self, progress: pb.PullProgress, room: int = _WIDEST_BAR) -> str:
        text = f"  resumed at {format_size(progress.resumed_bytes)}" if progress.resumed_bytes else ""
        return self._palette.faint(text) if len(text) <= room else ""


def _began(progress: pb.PullProgress) -> bool:
    return progress.state in _ENDS or progress.completed_bytes > 0


def _cut(line: str, width: int) -> str:
    """Return *line* cut to *width* cells; a line that wraps could not be drawn over."""
    return line if cell_width(line) <= width else without_colour(line)[:width]


class LineReporter:
    """A line when the state of a file changes, and one every few seconds in between."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, *, chatty: bool = True) -> None:
        self._stream = stream
        self._clock = clock
        self._chatty = chatty
        self._steps = _Steps(clock)
        self._last_line: dict[str, float] = {}

    def status(self, text: str) -> None:
        """Write *text*."""
        self._write(text)

    def progress(self, progress: pb.PullProgress) -> None:
        """Write a line if there is something new to say."""
        step, changed = self._steps.update(progress)
        nothing_known = not progress.completed_bytes and not progress.total_bytes
        if not self._chatty or progress.state == State.STATE_RESOLVING or nothing_known:
            return
        now = self._clock()
        if changed or now - self._last_line.get(step.label, now) >= _PLAIN_LINE_S:
            self._last_line[step.label] = now
            self._write(self._line(step, now))

    def refresh(self) -> None:
        """Do nothing: a line without news would be noise."""

    def close(self) -> None:
        """Do nothing: every line stands for good."""

    def _line(self, step: _Step, now: float) -> str:
        progress = step.progress
        match progress.state:
            case State.STATE_DONE:
                return f"{step.label}: done, {format_size(progress.total_bytes or progress.completed_bytes)}"
            case State.STATE_PRESENT:
                return f"{step.label}: already here"
            case State.STATE_COMMITTING:
                return f"{step.label}: writing to disk"
            case State.STATE_RETRYING:
                return f"{step.label}: retrying, {one_line(progress.detail)}"
        parts = [format_size(progress.completed_bytes)]
        if progress.total_bytes:
            parts[0] += f" of {format_size(progress.total_bytes)}"
            parts.append(f"{int(progress.completed_bytes / progress.total_bytes * 100)}%")
        rate = step.meter.rate(now)
        if rate is not None:
            parts.append(f"{format_size(rate)}/s")
        elif progress.resumed_bytes:
            parts.append(f"resumed at {format_size(progress.resumed_bytes)}")
        return f"{step.label}: {', '.join(parts)}"

    def _write(self, text: str) -> None:
        self._stream.write(f"{printable(text)}\n")
        self._stream.flush()


def reporter_for(stream: TextIO | None = None) -> Reporter:
    """Return what suits *stream*, stderr unless given: bars, lines, or only what begins when progress is unwanted."""
    stream = stream or sys.stderr
    if not progress_wanted():
        return LineReporter(stream, chatty=False)
    return BarReporter(stream) if can_redraw(stream) else LineReporter(stream)
