"""`lm serve`."""

from __future__ import annotations

import os
import select
import sys

import click

from lmd.cli.context import App, announce, note, pass_app
from lmd.cli.errors import BadUsage

_SLOW_STOP_S = 1.0


@click.command(
    "serve",
    short_help="Run the daemon in the foreground",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.option("--stop", is_flag=True, help="Stop the running daemon, and wait until it is gone.")
@click.argument("arguments", metavar="[LMD OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
@pass_app
def command(app: App, stop: bool, arguments: tuple[str, ...]) -> None:
    """Run the daemon in the foreground, as `lmd` does.

    All further options are those of the daemon. Ctrl-C stops it after the answers that are running.

    \b
    Examples:
      lm serve
      lm serve --stop
    """
    if not stop:
        # The client knows the daemon by its module name only; nothing of it is imported here.
        os.execv(sys.executable, [sys.executable, "-P", "-m", "lmd.daemon.main", *arguments])  # noqa: S606
    if arguments:
        raise BadUsage("`--stop` takes no further options")
    _stop(app)


def _stop(app: App) -> None:
    from lmd.v1 import system_service_pb2 as pb

    with app.daemon(start=False) as client:
        pid = client.status.pid
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            process = None  # it runs in another pid namespace, or is gone this moment
        client.call(client.system.Shutdown, pb.ShutdownRequest())
    if process is None:
        announce("stopping", f"lmd (pid {pid})")
        return
    try:
        _wait(process)
    finally:
        os.close(process)
    announce("stopped", f"lmd (pid {pid})")


def _wait(process: int) -> None:
    """Wait until the process ends: its pidfd becomes readable then."""
    ready, _, _ = select.select([process], [], [], _SLOW_STOP_S)
    if not ready:
        note("waiting for running answers; Ctrl-C leaves the daemon to it")
        select.select([process], [], [])
