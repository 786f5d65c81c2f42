"""`lm cp`."""

from __future__ import annotations

import click

from lmd.cli.context import App, announce, pass_app
from lmd.cli.options import MODEL, json_option


@click.command("cp", short_help="Give a model a second name")
@click.argument("source", type=MODEL)
@click.argument("destination", type=MODEL)
@json_option
@pass_app
def command(app: App, source: str, destination: str, as_json: bool) -> None:
    """Give a model a second name.

    Costs no disk space. What the name DESTINATION pointed to before stays an earlier version of it. NAME@NUMBER is a
    version of a model, as `lm history` lists them.

    \b
    Examples:
      lm cp hf.co/Qwen/Qwen3-0.6B-GGUF:Q8_0 qwen
      lm cp qwen qwen:before-update
      lm cp qwen@2 qwen:better
    """
    from lmd.cli.output import print_json
    from lmd.cli.shapes import model_json
    from lmd.cli.versions import split_version
    from lmd.v1 import model_service_pb2 as pb

    name, version = split_version(source)
    request = pb.CopyModelRequest(source=name, destination=destination, version=version)
    with app.daemon() as client:
        reply = client.call(client.models.CopyModel, request)
    if as_json:
        print_json(model_json(reply.model))
    else:
        announce("copied", f"{source} to {reply.model.name}")
