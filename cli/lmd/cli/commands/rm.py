"""`lm rm`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, announce, pass_app
from lmd.cli.errors import ClientError, render_error
from lmd.cli.options import MODEL
from lmd.cli.terminal import palette_for

if TYPE_CHECKING:
    from lmd.cli.client import Client


@click.command("rm", short_help="Remove models")
@click.argument("models", metavar="MODEL...", type=MODEL, nargs=-1, required=True)
@click.option("--missing-ok", is_flag=True, help="Count a name that is not there as removed.")
@pass_app
def command(app: App, models: tuple[str, ...], missing_ok: bool) -> None:
    """Remove models from the store.

    The names go at once. Disk space comes back as far as no other model shares it; answers that are running finish
    first. One name that fails does not keep the others.

    \b
    Examples:
      lm rm llama3.2
      lm rm --missing-ok llama3.2 qwen3
    """
    failures: list[ClientError] = []
    with app.daemon() as client:
        for model in models:
            try:
                _remove(client, model, missing_ok=missing_ok)
            except ClientError as error:
                failures.append(error)
    for failure in failures[:-1]:
        click.echo(render_error(failure, palette_for(sys.stderr), verbose=app.verbose), err=True)
    if failures:
        raise failures[-1]


def _remove(client: Client, model: str, *, missing_ok: bool) -> None:
    from lmd.cli.units import format_size
    from lmd.v1 import model_service_pb2 as pb

    reply = client.call(client.models.DeleteModel, pb.DeleteModelRequest(name=model, allow_missing=missing_ok))
    parts = []
    if reply.freed_bytes:
        parts.append(f"{format_size(reply.freed_bytes)} freed")
    if reply.pending_bytes:
        parts.append(f"{format_size(reply.pending_bytes)} follow when the model stops")
    announce("removed", model, ", ".join(parts))
