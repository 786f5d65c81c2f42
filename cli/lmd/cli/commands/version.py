"""`lm version`."""

from __future__ import annotations

import click

from lmd.cli.context import App, pass_app, warn
from lmd.cli.options import json_option


@click.command("version", short_help="Show the versions of both sides")
@json_option
@pass_app
def command(app: App, as_json: bool) -> None:
    """Show the versions of `lm` and of the daemon, and warn when they differ.

    Starts no daemon.

    \b
    Examples:
      lm version
      lm version --json
    """
    from lmd.cli.errors import UNREACHABLE, ClientError
    from lmd.cli.output import print_json
    from lmd.v1.version import API_VERSION, __version__

    server = None
    try:
        with app.daemon(start=False) as client:
            server = client.status
    except ClientError as error:
        if error.reason != UNREACHABLE:
            raise
    if server is not None and server.version != __version__:
        warn(f"this is lm {__version__}, the daemon is lmd {server.version}; restart it to update it")
    if as_json:
        daemon = None
        if server is not None:
            daemon = {
                "version": server.version,
                "api_version": server.api_version,
                "engine_version": server.engine_version,
                "pid": server.pid,
            }
        print_json({"version": __version__, "api_version": API_VERSION, "daemon": daemon})
        return
    click.echo(f"lm   {__version__}")
    if server is None:
        click.echo("lmd  not running")
    else:
        click.echo(f"lmd  {server.version}  (engine {server.engine_version or 'unknown'}, pid {server.pid})")
