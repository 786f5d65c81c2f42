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
@json_option
@pass_app
def command(app: App, name: str, modelfile: str, as_json: bool) -> None:
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
    """
    from lmd.cli.modelfiles import read_modelfile
    from lmd.cli.output import print_json
    from lmd.cli.shapes import model_json

    text = read_modelfile(modelfile)
    directory = Path.cwd() if modelfile == "-" else Path(modelfile).absolute().parent
    with app.daemon() as client:
        created = create_model(client, name, text, directory, "stdin" if modelfile == "-" else modelfile)
    if as_json:
        print_json(model_json(created))
    else:
        announce("created", created.name)


def create_model(
    client: Client, name: str, text: str, directory: Path, shown_as: str, *, edited_digest: str = ""
) -> model_pb2.Model:
    """Make a model of a Modelfile, whose relative paths start at *directory*, and show how that goes.

    *edited_digest* makes it an edit of the manifest that *name* points to.

    Raises:
        ClientError: the Modelfile has mistakes, which are shown under the name *shown_as*, or the model cannot be made.
    """
    from lmd.cli.model_files import referred_files
    from lmd.cli.modelfiles import mistakes_error, with_places
    from lmd.cli.progress import reporter_for
    from lmd.cli.pulling import token_from_environment
    from lmd.cli.terminal import quiet_keyboard
    from lmd.cli.ticking import with_ticks
    from lmd.cli.uploads import store_file
    from lmd.v1 import model_service_pb2 as pb

    try:
        checked = client.call(
            client.models.CheckModelfile, pb.CheckModelfileRequest(modelfile=text, tell_mistakes=True)
        )
        if checked.mistakes:
            raise mistakes_error(checked.mistakes)
    except ClientError as error:
        raise with_places(error, text, shown_as) from None
    for warning in checked.warnings:
        warn(f"{shown_as}:{warning.line}:{warning.column}: {warning.message}")
    files = referred_files([*getattr(checked, "from"), *checked.draft], directory, attached=checked.attached)
    with quiet_keyboard(), closing(reporter_for()) as reporter:
        digests = {argument: store_file(client, path, reporter) for argument, path in files.items()}
        request = pb.CreateModelRequest(name=name, modelfile=text, files=digests, token=token_from_environment())
        request.edited_digest = edited_digest
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
