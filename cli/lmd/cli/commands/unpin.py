"""`lm unpin`."""

from __future__ import annotations

import click

from lmd.cli.context import App, announce, pass_app
from lmd.cli.options import PINNED, json_option


@click.command("unpin", short_help="Let pinned models leave memory again")
@click.argument("models", metavar="MODEL...", type=PINNED, nargs=-1, required=True)
@json_option
@pass_app
def command(app: App, models: tuple[str, ...], as_json: bool) -> None:
    """Let pinned models leave memory again like any other: when nobody uses them, or when others need the memory.

    \b
    Examples:
      lm unpin llama3.2
    """
    from lmd.cli.output import print_json
    from lmd.v1 import runtime_service_pb2 as pb

    unpinned = []
    with app.daemon() as client:
        for model in models:
            name = client.call(client.runtime.UnpinModel, pb.UnpinModelRequest(name=model)).name or model
            unpinned.append(name)
            if not as_json:
                announce("unpinned", name)
    if as_json:
        print_json([{"name": name} for name in unpinned])
