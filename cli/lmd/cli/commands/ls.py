"""`lm ls`."""

from __future__ import annotations

import time

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import MODEL, json_option


@click.command("ls", short_help="List the models of the store")
@click.argument("prefix", type=MODEL, required=False, default="")
@json_option
@pass_app
def command(app: App, prefix: str, as_json: bool) -> None:
    """List the models of the store, most recently changed first.

    With PREFIX, only names that start with it. SIZE is all a model needs, OWN the part that no other name needs: a
    model made from another one shares its weights.

    \b
    Examples:
      lm ls
      lm ls hf.co/
      lm ls --json | jq -r '.[].name'
    """
    from lmd.cli.listing import all_models
    from lmd.cli.output import print_json, print_table
    from lmd.cli.shapes import model_json, unix_time
    from lmd.cli.units import format_ago, format_count, format_size

    with app.daemon() as client:
        models = all_models(client, prefix)
    if as_json:
        print_json([model_json(model) for model in models])
        return
    now = time.time()
    rows = [
        (
            model.name,
            model.digest.removeprefix("sha256:")[:12],
            format_count(model.details.parameter_count) if model.details.parameter_count else "",
            model.details.quantization,
            format_size(model.size_bytes),
            format_size(model.own_bytes),
            format_ago(now - unix_time(model.modified_time)),
        )
        for model in models
    ]
    headers = ("NAME", "ID", "PARAMS", "QUANT", "SIZE", "OWN", "MODIFIED")
    print_table(headers, rows, right=("PARAMS", "SIZE", "OWN"), optional=("OWN", "ID", "PARAMS", "QUANT"))
