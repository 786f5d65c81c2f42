"""`lm gc`."""

from __future__ import annotations

import time

import click

from lmd.cli.context import App, announce, note, pass_app
from lmd.cli.options import DURATION, json_option


@click.command("gc", short_help="Free disk space that nothing needs")
@click.option("-n", "--dry-run", is_flag=True, help="Only list what would go.")
@click.option(
    "--grace", type=DURATION, metavar="DURATION", help="Spare what is younger, such as 10m. Default: the daemon's."
)
@click.option(
    "--history",
    type=DURATION,
    metavar="DURATION",
    help="Spare earlier versions replaced less than this ago. Default: the daemon's.",
)
@json_option
@pass_app
def command(app: App, dry_run: bool, grace: float | None, history: float | None, as_json: bool) -> None:
    """Free disk space that nothing needs.

    Removes blobs that belong to no model, unfinished downloads that nothing resumes, and damaged files in
    quarantine. What is younger than the grace period stays, as something may be about to use it. Models, running
    pulls and everything in memory are safe; so are earlier versions of models for as long as `store.history` in the
    daemon's configuration says.

    \b
    Examples:
      lm gc --dry-run
      lm gc --grace 0
      lm gc --history 0
    """
    from lmd.cli.errors import BadUsage
    from lmd.cli.output import print_json, print_table
    from lmd.cli.shapes import enum_text, garbage_json, unix_time
    from lmd.cli.units import format_ago, format_size
    from lmd.v1 import store_service_pb2 as pb

    request = pb.CollectGarbageRequest(dry_run=dry_run)
    if grace is not None:
        if grace < 0:
            raise BadUsage("the grace period cannot be negative")
        request.grace_period.FromNanoseconds(int(grace * 1e9))
    if history is not None:
        if history < 0:
            raise BadUsage("the time to keep versions for cannot be negative")
        request.history.FromNanoseconds(int(history * 1e9))
    items, summary = [], pb.GarbageSummary()
    with app.daemon() as client, client.stream(client.store.CollectGarbage, request) as events:
        for event in events:
            if event.HasField("item"):
                items.append(event.item)
            elif event.HasField("summary"):
                summary = event.summary
    if as_json:
        sums = {"freed_bytes": summary.freed_bytes, "spared_items": summary.spared_items, "dry_run": dry_run}
        print_json({"items": [garbage_json(item) for item in items], **sums})
        return
    if items:
        now = time.time()
        rows = [
            (
                enum_text(item, "kind"),
                item.digest,
                format_size(item.size_bytes),
                format_ago(now - unix_time(item.modified_time)),
            )
            for item in items
        ]
        print_table(("KIND", "DIGEST", "SIZE", "MODIFIED"), rows, right=("SIZE",))
    things = "1 thing" if summary.items == 1 else f"{summary.items} things"
    spared = f"spared {summary.spared_items} younger than the grace period" if summary.spared_items else ""
    if not summary.items:
        note(f"nothing to free{f'; {spared}' if spared else ''}")
    else:
        announce("would free" if dry_run else "freed", f"{format_size(summary.freed_bytes)} in {things}", spared)
