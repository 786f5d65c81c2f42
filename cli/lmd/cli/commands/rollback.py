"""`lm rollback`."""

from __future__ import annotations

import click

from lmd.cli.context import App, announce, pass_app
from lmd.cli.options import MODEL, json_option
from lmd.cli.versions import VERSION


@click.command("rollback", short_help="Go back to an earlier version of a model")
@click.argument("model", type=MODEL)
@click.argument("version", type=VERSION, required=False)
@json_option
@pass_app
def command(app: App, model: str, version: int | None, as_json: bool) -> None:
    """Go back to an earlier version of a model: VERSION, or the one before.

    That makes a new version, so nothing is lost; a second rollback goes back one version further. Answers that are
    running finish on what they began with. `lm history` shows the versions and which of them are kept.

    \b
    Examples:
      lm rollback poet
      lm rollback poet 2
    """
    from lmd.cli.output import print_json
    from lmd.cli.shapes import model_json
    from lmd.v1 import model_service_pb2 as pb

    with app.daemon() as client:
        request = pb.RollbackModelRequest(name=model, version=version or 0)
        reply = client.call(client.models.RollbackModel, request)
    if as_json:
        print_json({**model_json(reply.model), "version": reply.version})
    else:
        announce("rolled back", f"{reply.model.name} to version {reply.version}")
