"""`lm ps`."""

from __future__ import annotations

import time

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import json_option


@click.command("ps", short_help="List the models in memory")
@click.option("-w", "--watch", is_flag=True, help="Keep showing them, until Ctrl-C.")
@click.option("--plan", is_flag=True, help="Show what waits for memory, and what was decided last and why.")
@json_option
@pass_app
def command(app: App, watch: bool, plan: bool, as_json: bool) -> None:
    """List the models in memory, longest resident first.

    SLOTS are the answers that run, of those that can run at once; QUEUED is how many wait for a slot; CACHE is how
    much of all prompts was taken from the prefix cache; UNTIL is when the model leaves memory if nobody uses it.

    --watch keeps the table up to date. In a pipe it prints a line for each change of state, and with --json one for
    each change of anything: the runners, and the events that led there.

    --plan shows the other side: which models wait for memory and for what, and the last decisions: to load, to evict
    an idle model, to wait, to have a busy model give up its turn, or to refuse.

    \b
    Examples:
      lm ps
      lm ps --watch
      lm ps --plan
      lm ps --json | jq '.[] | {name, memory_bytes}'
      lm ps --watch --json | jq '.events[] | select(.state == "failed")'
    """
    from lmd.cli.output import print_json
    from lmd.cli.plans import plan_json, print_plan
    from lmd.cli.runners import print_runners, watch_runners
    from lmd.cli.shapes import runner_json
    from lmd.v1 import runtime_service_pb2 as pb

    if watch and plan:
        raise click.UsageError("--watch and --plan cannot be combined")
    with app.daemon() as client:
        if plan:
            decisions = client.call(client.runtime.GetPlan, pb.GetPlanRequest())
            if as_json:
                print_json(plan_json(decisions))
            else:
                print_plan(decisions, time.time())
            return
        if watch:
            watch_runners(client, as_json=as_json)
            return
        runners = client.call(client.runtime.ListRunners, pb.ListRunnersRequest()).runners
    if as_json:
        print_json([runner_json(runner) for runner in runners])
    else:
        print_runners(runners)
