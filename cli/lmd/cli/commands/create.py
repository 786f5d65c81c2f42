"""`lm create`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, announce, pass_app, warn
from lmd.cli.errors import ClientError
from lmd.cli.options import MODEL, json_option

if TYPE_CHECKING:
    from lmd.cli.client import Client
    from lmd.v1 import model_pb2
    from lmd.v1 import model_service_pb2 as pb


@click.command("create", short_help="Create a model from a Modelfile")
@click.argument("name", type=MODEL)
@click.option(
    "-f",
    "--file",
    "modelfile",
    default="Modelfile",
    metavar="PATH",
    help="The Modelfile; - is stdin. Default: ./Modelfile.",
)
@click.option("-q", "--quantize", metavar="TYPE", help="Quantize the weights, as `lm quantize` does.")
@click.option("--requantize", is_flag=True, help="Allow weights that are quantized already, which loses more.")
@json_option
@pass_app
def command(app: App, name: str, modelfile: str, quantize: str | None, requantize: bool, as_json: bool) -> None:
    """Create a model from a Modelfile, or replace the one that has the name.

    FROM names a model, which is pulled when it is not here, a GGUF file, or a folder of shards; relative paths start
    at the Modelfile. PARAMETER, TEMPLATE, SYSTEM, MESSAGE and LICENSE win over those of the base. ADAPTER names a LoRA
    adapter and its scale. DRAFT names a smaller model with the same vocabulary, which makes answers faster without
    changing them.

    \b
    Examples:
      lm create poet
      lm create poet -f poet.Modelfile
      echo "FROM ./model.gguf" | lm create mine -f -
      lm create small --quantize Q4_K_M
    """
    from lmd.cli.modelfiles import read_modelfile
    from lmd.cli.output import print_json
    from lmd.cli.pulling import token_from_environment
    from lmd.cli.shapes import model_json
    from lmd.v1 import model_service_pb2 as pb

    text = read_modelfile(modelfile)
    directory = Path.cwd() if modelfile == "-" else Path(modelfile).absolute().parent
    with app.daemon() as client:
        request = pb.CreateModelRequest(
            name=name, modelfile=text, quantize=quantize or "", requantize=requantize, token=token_from_environment()
        )
        created = create_model(client, request, directory, "stdin" if modelfile == "-" else modelfile)
    if as_json:
        print_json(model_json(created))
    else:
        announce("created", created.name)


def create_model(client: Client, request: pb.CreateModelRequest, directory: Path, shown_as: str) -> model_pb2.Model:
    """Make a model of the Modelfile of *request*, whose relative paths start at *directory*, and show how that goes.

    Raises:
        ClientError: the Modelfile has mistakes, which are shown under the name *shown_as*, or the model cannot be made.
    """
    from lmd.cli.model_files import referred_files
    from lmd.cli.modelfiles import mistakes_error, with_places
    from lmd.cli.progress import reporter_for
    from lmd.cli.terminal import quiet_keyboard
    from lmd.cli.ticking import with_ticks
    from lmd.cli.uploads import store_file
    from lmd.v1 import model_service_pb2 as pb

    try:
        checked = client.call(
            client.models.CheckModelfile, pb.CheckModelfileRequest(modelfile=request.modelfile, tell_mistakes=True)
        )
        if checked.mistakes:
            raise mistakes_error(checked.mistakes)
    except ClientError as error:
        raise with_places(error, request.modelfile, shown_as) from None
    for warning in checked.warnings:
        warn(f"{shown_as}:{warning.line}:{warning.column}: {warning.message}")
    files = referred_files([*getattr(checked, "from"), *checked.draft], directory, attached=checked.attached)
    with quiet_keyboard(), closing(reporter_for()) as reporter:
        request.files.update({argument: store_file(client, path, reporter) for argument, path in files.items()})
        with client.stream(client.models.CreateModel, request) as events:
            for event in with_ticks(events):
                if event is None:
                    reporter.refresh()
                elif event.HasField("status"):
                    reporter.status(event.status)
                elif event.HasField("progress"):
                    reporter.progress(event.progress)
                elif event.HasField("model"):
                    return event.model
    raise ClientError("the daemon ended the creation without a result", reason="INTERNAL")
