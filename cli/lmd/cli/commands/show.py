"""`lm show`."""

from __future__ import annotations

import time

import click

from lmd.cli.context import App, pass_app
from lmd.cli.errors import BadUsage
from lmd.cli.options import MODEL, json_option

_PARTS = ("modelfile", "template", "system", "parameters", "license")


@click.command("show", short_help="Show what a model is")
@click.argument("model", type=MODEL)
@click.option("--modelfile", is_flag=True, help="Print a Modelfile that recreates the model.")
@click.option("--template", is_flag=True, help="Print the chat template.")
@click.option("--system", is_flag=True, help="Print the system prompt.")
@click.option("--parameters", is_flag=True, help="Print the parameters the model sets.")
@click.option("--license", is_flag=True, help="Print the licences in full.")
@json_option
@pass_app
def command(app: App, /, model: str, as_json: bool, **parts: bool) -> None:
    """Show what a model is: its architecture, size, source, settings, and what it can do.

    NAME@NUMBER is a version of a model, as `lm history` lists them. `lm tokenize --chat` shows what the template makes
    of a message.

    \b
    Examples:
      lm show llama3.2
      lm show --modelfile llama3.2 > Modelfile
      lm show --system llama3.2@1
      lm show --json llama3.2 | jq .metadata
    """
    from lmd.cli.describe import facts, part_text
    from lmd.cli.output import print_facts, print_json
    from lmd.cli.shapes import model_info_json
    from lmd.cli.versions import get_info

    wanted = [part for part in _PARTS if parts[part]]
    if len(wanted) + as_json > 1:
        raise BadUsage(f"{', '.join(f'`--{part}`' for part in _PARTS)} and `--json` exclude each other")
    with app.daemon() as client:
        info = get_info(client, model)
    if as_json:
        print_json(model_info_json(info))
    elif wanted:
        text = part_text(info, wanted[0])
        if text:
            click.echo(text)
    else:
        print_facts(facts(info, time.time()))
