"""`lm pin`."""

from __future__ import annotations

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import MODEL, json_option


@click.command("pin", short_help="Keep models in memory")
@click.argument("models", metavar="MODEL...", type=MODEL, nargs=-1, required=True)
@click.option("-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Set a parameter; may be repeated.")
@json_option
@pass_app
def command(app: App, models: tuple[str, ...], options: tuple[str, ...], as_json: bool) -> None:
    """Load models and keep them in memory until `lm unpin`.

    A pinned model never makes room for another one, and is loaded again when the daemon starts or its runner dies.
    What is pinned is the name: after a new version of it, that one. A model that does not fit beside the pinned ones
    is not pinned.

    `lm stop` unloads a pinned model all the same; it comes back with the next request.

    \b
    Examples:
      lm pin llama3.2
      lm pin -o num_ctx=16384 llama3.2
    """
    from lmd.cli.loading import announce_loaded, ensure_model, pin
    from lmd.cli.output import print_json
    from lmd.cli.parameters import parse_options
    from lmd.cli.shapes import runner_json

    parameters = parse_options(options)
    pinned = []
    with app.daemon() as client:
        for model in models:
            name = ensure_model(client, model).model.name
            runner = pin(client, name, parameters)
            pinned.append(runner)
            if not as_json:
                announce_loaded(name, runner, "pinned")
    if as_json:
        print_json([runner_json(runner) for runner in pinned])
