"""`lm history`."""

from __future__ import annotations

import time

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import MODEL, json_option


@click.command("history", short_help="List the versions of a model")
@click.argument("model", type=MODEL)
@json_option
@pass_app
def command(app: App, model: str, as_json: bool) -> None:
    """List the versions of a model, newest first: when and how each came about, and what changed.

    Every pull, creation, edit, copy and rollback that changes a model makes a version. Earlier ones are kept for the
    time that `store.history` says, and longer where nothing has collected them; those that are gone are listed, too.
    NAME@NUMBER names a version for `lm show` and `lm diff`.

    \b
    Examples:
      lm history poet
      lm diff poet@1 poet
      lm history --json poet | jq '.versions[0].digest'
    """
    from lmd.cli.output import print_json, print_table
    from lmd.cli.shapes import unix_time, version_json
    from lmd.cli.units import format_ago
    from lmd.cli.versions import how_text, kept_text
    from lmd.v1 import model_service_pb2 as pb

    with app.daemon() as client:
        reply = client.call(client.models.ListVersions, pb.ListVersionsRequest(name=model))
    if as_json:
        print_json({"name": reply.name, "versions": [version_json(version) for version in reply.versions]})
        return
    now = time.time()
    rows = [
        (
            str(version.number),
            version.digest[7:19],
            format_ago(now - unix_time(version.time)),
            how_text(version),
            kept_text(version),
            version.change,
        )
        for version in reply.versions
    ]
    headers = ("VERSION", "DIGEST", "WHEN", "HOW", "KEPT", "CHANGE")
    print_table(headers, rows, right=("VERSION",), optional=("DIGEST", "KEPT"))
