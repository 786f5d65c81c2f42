"""`lm ps`."""

from __future__ import annotations

import time

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import json_option


@click.command("ps", short_help="List the models in memory")
@json_option
@pass_app
def command(app: App, as_json: bool) -> None:
    """List the models in memory, longest resident first.

    SLOTS are the answers that run, of those that can run at once; QUEUED is how many wait for a slot; CACHE is how
    much of all prompts was taken from the prefix cache; UNTIL is when the model leaves memory if nobody uses it.

    \b
    Examples:
      lm ps
      lm ps --json | jq '.[] | {name, memory_bytes}'
    """
    from lmd.cli.output import print_json, print_table
    from lmd.cli.shapes import cache_share, enum_text, runner_json, until_text
    from lmd.cli.units import format_size
    from lmd.v1 import runtime_service_pb2 as pb

    with app.daemon() as client:
        runners = client.call(client.runtime.ListRunners, pb.ListRunnersRequest()).runners
    if as_json:
        print_json([runner_json(runner) for runner in runners])
        return
    now = time.time()
    headers = ["NAME", "STATE", "DEVICE", "MEMORY", "CONTEXT", "SLOTS", "QUEUED", "CACHE", "UNTIL"]
    rows = [
        [
            runner.name,
            enum_text(runner, "state"),
            runner.device,
            format_size(runner.memory_bytes),
            str(runner.context_length or ""),
            f"{runner.slots_busy}/{runner.slots}",
            str(runner.queued),
            cache_share(runner),
            until_text(runner, now),
        ]
        for runner in runners
    ]
    if any(runner.reason for runner in runners):
        headers.append("REASON")
        rows = [[*row, runner.reason] for row, runner in zip(rows, runners, strict=True)]
    right = ("MEMORY", "CONTEXT", "SLOTS", "QUEUED", "CACHE")
    print_table(headers, rows, right=right, optional=("CACHE", "CONTEXT", "QUEUED", "DEVICE"))
