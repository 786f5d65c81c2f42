"""The table of the models in memory, once or live."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click
from click.exceptions import Exit

from lmd.cli.context import note
from lmd.cli.errors import EXIT_INTERRUPTED
from lmd.cli.live import LiveRegion
from lmd.cli.output import print_table, table_lines
from lmd.cli.shapes import cache_share, enum_text, event_state, runner_event_json, runner_json, time_text, until_text
from lmd.cli.terminal import can_redraw, cell_width, palette_for, quiet_keyboard, terminal_size
from lmd.cli.ticking import with_ticks
from lmd.cli.units import format_size
from lmd.v1 import runtime_service_pb2 as pb

if TYPE_CHECKING:
    from lmd.cli.client import Client

HEADERS = ("NAME", "STATE", "DEVICE", "MEMORY", "CONTEXT", "SLOTS", "QUEUED", "CACHE", "UNTIL")
RIGHT = ("MEMORY", "CONTEXT", "SLOTS", "QUEUED", "CACHE")
#: Left out on a narrow terminal, the first first.
OPTIONAL = ("CACHE", "CONTEXT", "QUEUED", "DEVICE")
#: The sizes and times in a reason.
_FIGURES = re.compile(r"\b\d[\d.]* (?:B|[KMGT]iB|s|min|h)\b")
#: When a model leaves is told in words that change with time.
_BEAT_S = 1.0


def print_runners(runners: Sequence[pb.Runner]) -> None:
    """Print the table."""
    headers, rows = _cells(runners, time.time())
    print_table(headers, rows, right=RIGHT, optional=OPTIONAL, wrapped="REASON")


def runner_lines(runners: Sequence[pb.Runner], now: float, columns: int) -> list[str]:
    """Return the table in lines of at most *columns*; what is still too wide then loses the end of its reason."""
    headers, rows = _cells(runners, now)
    lines = table_lines(headers, rows, right=RIGHT, optional=OPTIONAL, columns=columns)
    return [_cut(line, columns) for line in lines]


def watch_runners(client: Client, *, as_json: bool) -> None:
    """Show the runners until the user leaves or the daemon stops.

    On a terminal that is one table which is drawn over; elsewhere a line for each event, or for each picture as JSON.

    Raises:
        ClientError: the connection is lost.
        Exit: the user left.
    """
    request = pb.WatchRunnersRequest()
    try:
        with quiet_keyboard(), client.stream(client.runtime.WatchRunners, request) as pictures:
            if as_json:
                _follow_as_json(pictures)
            elif can_redraw(sys.stdout):
                _follow_live(pictures)
            else:
                _follow_as_lines(pictures)
    except KeyboardInterrupt:
        raise Exit(EXIT_INTERRUPTED) from None
    note("the daemon shuts down")


def _follow_as_json(pictures: Iterable[pb.WatchRunnersResponse]) -> None:
    for picture in pictures:
        shown = {
            "runners": [runner_json(runner) for runner in picture.runners],
            "events": [runner_event_json(event) for event in picture.events],
        }
        click.echo(json.dumps(shown, ensure_ascii=False))


def _follow_as_lines(pictures: Iterable[pb.WatchRunnersResponse]) -> None:
    told: dict[str, tuple[str, str]] = {}
    for picture in pictures:
        for number, event in enumerate(picture.events):
            news = (event_state(event), _FIGURES.sub("", event.reason))
            later = next((other for other in picture.events[number + 1 :] if other.name == event.name), None)
            # What passed at once, and memory that is a little more or less free than before, is nothing to read.
            if news == told.get(event.name) or (later is not None and event_state(later) == news[0]):
                continue
            told[event.name] = news
            reason = f"  {event.reason}" if event.reason else ""
            click.echo(f"{time_text(event.time)}  {event.name}  {event_state(event)}{reason}")


def _follow_live(pictures: Iterable[pb.WatchRunnersResponse]) -> None:
    palette, runners = palette_for(sys.stdout), list[pb.Runner]()
    region = LiveRegion(sys.stdout)
    lines: list[str] = []
    try:
        for picture in with_ticks(pictures, _BEAT_S):
            if picture is not None:
                runners = list(picture.runners)
            lines = runner_lines(runners, time.time(), terminal_size().columns)
            if not runners:
                lines = ["no model is in memory"]
            region.draw([palette.faint(lines[0]), *lines[1:]])
    finally:
        # The last picture stays.
        region.clear(above="".join(f"{line}\n" for line in lines))


def _cut(line: str, columns: int) -> str:
    """Cut the end off a line that is too wide: that is the reason, whose beginning says most."""
    while cell_width(line) > columns:
        line = line[: min(len(line) - 2, columns - 1)] + "…"
    return line


def _cells(runners: Sequence[pb.Runner], now: float) -> tuple[list[str], list[list[str]]]:
    headers = list(HEADERS)
    rows = [
        [
            runner.name,
            enum_text(runner, "state"),
            _device(runner),
            format_size(runner.memory_bytes),
            str(runner.context_length or ""),
            f"{runner.slots_busy}/{runner.slots}",
            str(runner.queued),
            cache_share(runner),
            until_text(runner, now),
        ]
        for runner in runners
    ]
    if any(runner.reason for runner in runners):
        headers.append("REASON")
        rows = [[*row, runner.reason] for row, runner in zip(rows, runners, strict=True)]
    return headers, rows


def _device(runner: pb.Runner) -> str:
    """Return where it computes; of several devices, how much of it is on each."""
    if len(runner.shares) < 2:
        return runner.shares[0].device if runner.shares else runner.device
    total = sum(share.bytes for share in runner.shares) or 1
    return " ".join(f"{share.device}:{share.bytes / total:.0%}" for share in runner.shares)
