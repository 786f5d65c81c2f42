"""`lm rm`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, announce, pass_app
from lmd.cli.errors import ClientError, show_error
from lmd.cli.options import MODEL, json_option

if TYPE_CHECKING:
    from lmd.cli.client import Client
    from lmd.v1 import model_service_pb2 as pb


@click.command("rm", short_help="Remove models")
@click.argument("models", metavar="MODEL...", type=MODEL, nargs=-1, required=True)
@click.option("--missing-ok", is_flag=True, help="Count a name that is not there as removed.")
@json_option
@pass_app
def command(app: App, models: tuple[str, ...], missing_ok: bool, as_json: bool) -> None:
    """Remove models from the store.

    The names go at once. Disk space comes back as far as no other model shares it; answers that are running finish
    first. One name that fails does not keep the others.

    \b
    Examples:
      lm rm llama3.2
      lm rm --missing-ok llama3.2 qwen3
    """
    from lmd.cli.output import print_json

    removed: dict[str, pb.DeleteModelResponse] = {}
    failures: list[ClientError] = []
    with app.daemon() as client:
        for model in models:
            try:
                removed[model] = _remove(client, model, missing_ok=missing_ok)
            except ClientError as error:
                failures.append(error)
            else:
                if not as_json:
                    _announce(model, removed[model])
    if as_json and removed:
        print_json(
            [
                {"name": model, "freed_bytes": reply.freed_bytes, "pending_bytes": reply.pending_bytes}
                for model, reply in removed.items()
            ]
        )
    for failure in failures[:-1]:
        if as_json:
            click.echo(json.dumps(failure.as_json()), err=True)
        else:
            show_error(failure)
    if failures:
        raise failures[-1]


def _remove(client: Client, model: str, *, missing_ok: bool) -> pb.DeleteModelResponse:
    from lmd.v1 import model_service_pb2 as pb

    return client.call(client.models.DeleteModel, pb.DeleteModelRequest(name=model, allow_missing=missing_ok))


def _announce(model: str, reply: pb.DeleteModelResponse) -> None:
    from lmd.cli.units import format_size

    parts = []
    if reply.freed_bytes:
        parts.append(f"{format_size(reply.freed_bytes)} freed")
    if reply.pending_bytes:
        parts.append(f"{format_size(reply.pending_bytes)} to come when it stops")
    announce("removed", model, ", ".join(parts))
