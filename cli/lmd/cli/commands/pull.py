"""`lm pull`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, announce, note, pass_app
from lmd.cli.errors import BadUsage
from lmd.cli.options import MODEL, json_option

if TYPE_CHECKING:
    from lmd.cli.client import Client


@click.command("pull", short_help="Download a model into the store")
@click.argument("model", type=MODEL, required=False)
@click.option("-d", "--detach", is_flag=True, help="Return at once; the daemon goes on by itself.")
@click.option("--list", "list_pulls", is_flag=True, help="List the pulls under way and those of the last hour.")
@click.option("--cancel", is_flag=True, help="Stop the pull of MODEL for everyone who watches it.")
@json_option
@pass_app
def command(app: App, model: str | None, detach: bool, list_pulls: bool, cancel: bool, as_json: bool) -> None:
    """Download a model into the store.

    MODEL is a known name, a repository of the Hub, an address, or a file. What is in the store already is not
    downloaded again, and an interrupted pull goes on where it stopped. A token for gated repositories is taken from
    HF_TOKEN.

    With --json, prints one event per line.

    \b
    Examples:
      lm pull llama3.2
      lm pull hf.co/Qwen/Qwen3-0.6B-GGUF:Q8_0
      lm pull https://example.com/model.gguf
      lm pull --detach llama3.2 && lm pull --list
      lm pull --cancel llama3.2
    """
    if sum((detach, list_pulls, cancel)) > 1:
        raise BadUsage("`--detach`, `--list` and `--cancel` exclude each other")
    if list_pulls:
        if model is not None:
            raise BadUsage("`--list` takes no MODEL")
        with app.daemon() as client:
            _list(client, as_json=as_json)
        return
    if model is None:
        raise BadUsage("which model?", hint="`lm pull --help` shows what MODEL can be")
    with app.daemon() as client:
        if cancel:
            from lmd.v1 import model_service_pb2 as pb

            client.call(client.models.CancelPull, pb.CancelPullRequest(pull_id=model))
            announce("cancelled", model, "what arrived is kept for the next pull")
        elif as_json:
            _pull_json(client, model, detach=detach)
        elif detach:
            _detach(client, model)
        else:
            from lmd.cli.pulling import pull

            pull(client, model)


def _detach(client: Client, ref: str) -> None:
    from lmd.cli.pulling import token_from_environment
    from lmd.v1 import model_service_pb2 as pb

    request = pb.PullModelRequest(ref=ref, detach=True, token=token_from_environment())
    with client.stream(client.models.PullModel, request) as events:
        for event in events:
            if event.HasField("started"):
                note(f"pulling {event.started.name} in the background; `lm pull --list` shows how far it is")
                return
            if event.HasField("model"):
                announce("pulled", event.model.name)
                return


def _pull_json(client: Client, ref: str, *, detach: bool) -> None:
    import json

    from lmd.cli.pulling import token_from_environment
    from lmd.cli.shapes import model_json, progress_json
    from lmd.v1 import model_service_pb2 as pb

    request = pb.PullModelRequest(ref=ref, detach=detach, token=token_from_environment())
    with client.stream(client.models.PullModel, request) as events:
        for event in events:
            match event.WhichOneof("event"):
                case "started":
                    started = event.started
                    line = {
                        "event": "started",
                        "pull_id": started.pull_id,
                        "name": started.name,
                        "joined": started.joined,
                    }
                case "progress":
                    line = progress_json(event.progress)
                case "model":
                    line = {"event": "model", **model_json(event.model)}
                case _:
                    continue
            click.echo(json.dumps(line, ensure_ascii=False))
            if detach and event.HasField("started"):
                return


def _list(client: Client, *, as_json: bool) -> None:
    from lmd.cli.output import print_json, print_table
    from lmd.cli.shapes import enum_text, pull_json, unix_time
    from lmd.cli.units import format_ago, format_size
    from lmd.v1 import model_service_pb2 as pb

    pulls = client.call(client.models.ListPulls, pb.ListPullsRequest()).pulls
    if as_json:
        print_json([pull_json(pull) for pull in pulls])
        return
    rows = []
    for pull in pulls:
        share = f"{int(pull.completed_bytes / pull.total_bytes * 100)}%" if pull.total_bytes else ""
        size = format_size(pull.total_bytes) if pull.total_bytes else ""
        age = format_ago(time.time() - unix_time(pull.start_time))
        rows.append((pull.name or pull.ref, enum_text(pull, "state"), share, size, age, pull.error_message))
    print_table(("NAME", "STATE", "DONE", "SIZE", "STARTED", ""), rows, right=("DONE", "SIZE"))
