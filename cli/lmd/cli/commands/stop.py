"""`lm stop`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, announce, note, pass_app
from lmd.cli.errors import BadUsage
from lmd.cli.options import RESIDENT, json_option

if TYPE_CHECKING:
    from lmd.v1.runtime_service_pb2 import Runner


@click.command("stop", short_help="Unload models from memory")
@click.argument("models", metavar="[MODEL]...", type=RESIDENT, nargs=-1)
@click.option("-a", "--all", "stop_all", is_flag=True, help="Unload every model.")
@click.option("-f", "--force", is_flag=True, help="Cut the answers that are running.")
@json_option
@pass_app
def command(app: App, models: tuple[str, ...], stop_all: bool, force: bool, as_json: bool) -> None:
    """Unload models from memory.

    A model that is answering stops when its answers are done. The model stays in the store and is loaded again when
    it is used; a pinned one stays pinned.

    \b
    Examples:
      lm stop llama3.2
      lm stop --all --force
    """
    from lmd.cli.stopping import unload
    from lmd.v1 import runtime_service_pb2 as pb

    if bool(models) == stop_all:
        raise BadUsage("name the models to stop, or use `--all`", hint="`lm ps` lists what is in memory")
    stopped: list[dict[str, object]] = []
    with app.daemon() as client:
        runners = client.call(client.runtime.ListRunners, pb.ListRunnersRequest()).runners
        pinned = {runner.name for runner in runners if runner.pinned}
        for model in models or _resident(runners, force=force):
            done = unload(client, model, force=force)
            name = done.name or model
            stopped.append({"name": name, "running_answers": done.running_answers})
            if not as_json:
                _announce(name, done.running_answers, force=force)
                if name in pinned:
                    note(f"{name} is pinned and comes back with the next request; `lm unpin {name}` ends that")
    if as_json:
        from lmd.cli.output import print_json

        print_json(stopped)


def _resident(runners: Iterable[Runner], *, force: bool) -> list[str]:
    """Return the names of the models to stop: those that stop already only when their answers are to be cut."""
    names = [
        runner.name
        for runner in runners
        if runner.state != runner.STATE_FAILED and (force or runner.state != runner.STATE_DRAINING)
    ]
    if not names:
        note("no model is in memory")
    return names


def _announce(model: str, running: int, *, force: bool) -> None:
    answers = "1 answer" if running == 1 else f"{running} answers"
    if not running:
        announce("stopped", model)
    elif force:
        announce("stopped", model, f"{answers} cut")
    else:
        done, them = ("is", "it") if running == 1 else ("are", "them")
        announce("stopping", model, f"when {answers} {done} done; `--force` cuts {them}")
