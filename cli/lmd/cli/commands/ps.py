"""`lm ps`."""

from __future__ import annotations

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import json_option


@click.command("ps", short_help="List the models in memory")
@click.option("-w", "--watch", is_flag=True, help="Keep showing them, until Ctrl-C.")
@json_option
@pass_app
def command(app: App, watch: bool, as_json: bool) -> None:
    """List the models in memory, longest resident first.

    SLOTS are the answers that run, of those that can run at once; QUEUED is how many wait for a slot; CACHE is how
    much of all prompts was taken from the prefix cache; UNTIL is when the model leaves memory if nobody uses it.

    --watch keeps the table up to date. In a pipe it prints a line for each change of state, and with --json one for
    each change of anything: the runners, and the events that led there.

    \b
    Examples:
      lm ps
      lm ps --watch
      lm ps --json | jq '.[] | {name, memory_bytes}'
      lm ps --watch --json | jq '.events[] | select(.state == "failed")'
    """
    from lmd.cli.output import print_json
    from lmd.cli.runners import print_runners, watch_runners
    from lmd.cli.shapes import runner_json
    from lmd.v1 import runtime_service_pb2 as pb

    with app.daemon() as client:
        if watch:
            watch_runners(client, as_json=as_json)
            return
        runners = client.call(client.runtime.ListRunners, pb.ListRunnersRequest()).runners
    if as_json:
        print_json([runner_json(runner) for runner in runners])
    else:
        print_runners(runners)
