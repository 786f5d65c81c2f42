"""`lm load`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import DURATION, MODEL, json_option

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration


@click.command("load", short_help="Load models into memory")
@click.argument("models", metavar="MODEL...", type=MODEL, nargs=-1, required=True)
@click.option("-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Set a parameter; may be repeated.")
@click.option(
    "--keep-alive",
    type=DURATION,
    metavar="DURATION",
    help="How long the models stay after their last use, such as 10m; -1 is for ever.",
)
@json_option
@pass_app
def command(
    app: App, models: tuple[str, ...], options: tuple[str, ...], keep_alive: float | None, as_json: bool
) -> None:
    """Load models into memory, so that the first answer need not wait for that.

    Models that are not in the store are pulled. Idle models leave when the memory does not suffice. Of the
    parameters those count that are settled when a model is loaded, such as num_ctx and num_gpu.

    Ctrl-C does not undo a load that has begun; `lm stop` does.

    \b
    Examples:
      lm load llama3.2
      lm load -o num_ctx=16384 --keep-alive 1h llama3.2
      lm load llama3.2 nomic-embed-text --json
    """
    from google.protobuf.duration_pb2 import Duration

    from lmd.cli.loading import announce_loaded, ensure_model, load
    from lmd.cli.output import print_json
    from lmd.cli.parameters import parse_options
    from lmd.cli.shapes import runner_json

    parameters = parse_options(options)
    stay: Duration | None = None
    if keep_alive is not None:
        stay = Duration()
        stay.FromNanoseconds(int(keep_alive * 1e9))
    loaded = []
    with app.daemon() as client:
        for model in models:
            name = ensure_model(client, model).model.name
            runner = load(client, name, parameters, stay)
            loaded.append(runner)
            if not as_json:
                announce_loaded(name, runner)
    if as_json:
        print_json([runner_json(runner) for runner in loaded])
