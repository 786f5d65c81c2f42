"""`lm status`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, pass_app, warn
from lmd.cli.options import json_option

if TYPE_CHECKING:
    from lmd.v1 import system_service_pb2


@click.command("status", short_help="Show the daemon and its devices")
@json_option
@pass_app
def command(app: App, as_json: bool) -> None:
    """Show the daemon: where it listens, where it keeps models, and which devices it can use.

    Files in the drop-in folder that are no models are listed with what is wrong, until they are mended or gone.

    Without a running daemon `lm --no-start status` fails with exit status 3.

    \b
    Examples:
      lm status
      lm --no-start status
      lm status --json | jq -r .store
      lm status --json | jq -r '.dropin_problems[].file'
    """
    from lmd.cli.output import print_facts, print_json
    from lmd.cli.shapes import status_json, unix_time, usage_json
    from lmd.cli.terminal import one_line
    from lmd.cli.units import format_size, format_span
    from lmd.v1 import store_service_pb2 as pb
    from lmd.v1.version import __version__

    with app.daemon() as client:
        status = client.status
        usage = client.call(client.store.GetDiskUsage, pb.GetDiskUsageRequest())
    if status.version != __version__:
        warn(f"this is lm {__version__}, the daemon is lmd {status.version}")
    if as_json:
        print_json({**status_json(status), "usage": usage_json(usage)})
        return
    state = "shutting down" if status.draining else "running"
    up = format_span(time.time() - unix_time(status.start_time))
    models = "1 model" if usage.models == 1 else f"{usage.models} models"
    waste = []
    if usage.ingests:
        waste.append(f"{format_size(usage.ingest_bytes)} of unfinished downloads")
    if usage.quarantined:
        waste.append(f"{format_size(usage.quarantined_bytes)} in quarantine")
    http = status.http or "off"
    print_facts(
        [
            (
                "Daemon",
                [
                    ("state", f"{state} for {up}, pid {status.pid}"),
                    ("version", f"lmd {status.version}, engine {status.engine_version or 'unknown'}"),
                    ("socket", one_line(status.socket)),
                    ("http", f"{http} ({one_line(status.http_detail)})" if status.http_detail else http),
                    ("config", one_line(status.config_file) or "defaults"),
                    ("memory", format_size(status.rss_bytes)),
                ],
            ),
            (
                "Store",
                [
                    ("path", one_line(status.store)),
                    ("drop-in", one_line(status.dropin)),
                    ("holds", f"{models}, {format_size(usage.blob_bytes)}"),
                    ("free", format_size(usage.free_bytes)),
                    ("saved KV", format_size(usage.kv_bytes) if usage.kv_bytes else ""),
                    ("waste", ", ".join(waste)),
                ],
            ),
            ("Drop-in folder", _dropin(status)),
            (
                "Devices",
                [
                    (
                        device.id,
                        f"{one_line(device.description)}, {one_line(device.reason)}"
                        if device.reason
                        else f"{one_line(device.description)}, "
                        f"{format_size(device.free_bytes)} of {format_size(device.total_bytes)} free",
                    )
                    for device in status.devices
                ],
            ),
        ]
    )


def _dropin(status: system_service_pb2.GetStatusResponse) -> list[tuple[str, str]]:
    """Return the files of the folder that are no models, and why."""
    from lmd.cli.shapes import unix_time
    from lmd.cli.terminal import one_line
    from lmd.cli.units import format_span

    now = time.time()
    facts = []
    for problem in status.dropin_problems:
        span = format_span(max(now - unix_time(problem.since_time), 0))
        since = f"waiting for {span}" if problem.waiting else f"for {span}"
        facts.append((one_line(problem.file), f"{one_line(problem.message)} ({since})"))
    if more := status.dropin_problem_count - len(facts):
        facts.append(("", f"and {more} more"))
    return facts
