"""What every command gets: the global options, and the way to the daemon."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmd.cli.terminal import palette_for, printable, text_columns, wrapped

if TYPE_CHECKING:
    from lmd.cli.client import Client


@dataclass(frozen=True, slots=True)
class App:
    """The global options of one `lm`."""

    socket: Path | None = None
    may_start: bool = True
    verbose: bool = False

    @contextmanager
    def daemon(self, *, start: bool = True) -> Iterator[Client]:
        """Connect to the daemon, starting the user's own when none answers and *start* and the options allow it.

        Raises:
            ClientError: no daemon answers, or none that may be used.
        """
        from lmd.cli.endpoints import find_daemon, not_running, place_from

        place = place_from(os.environ, self.socket)
        socket = find_daemon(place)
        if socket is None:
            if place.named or not (start and self.may_start):
                raise not_running(place)
            from lmd.cli.autostart import start_daemon

            socket = start_daemon(place, os.environ)
        from lmd.cli.client import Client

        with Client.connect(socket) as client:
            if self.verbose:
                note(f"connected to lmd {client.status.version} (pid {client.status.pid}) at {socket}")
            yield client


pass_app = click.make_pass_decorator(App)


def note(text: str) -> None:
    """Tell the user something on stderr."""
    click.echo(wrapped(printable(text), text_columns(sys.stderr)), err=True)


def announce(verb: str, subject: str, detail: str = "") -> None:
    """Tell the user on stderr what has been done to what."""
    palette = palette_for(sys.stderr)
    tail = f"  {palette.faint(printable(detail))}" if detail else ""
    click.echo(f"{palette.good(verb)} {printable(subject)}{tail}", err=True)


def warn(text: str) -> None:
    """Warn the user on stderr."""
    line = f"{palette_for(sys.stderr).warning('warning:')} {printable(text)}"
    click.echo(wrapped(line, text_columns(sys.stderr)), err=True)
