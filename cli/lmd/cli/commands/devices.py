"""`lm devices`."""

from __future__ import annotations

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import json_option


@click.command("devices", short_help="List what models can be loaded on")
@click.option(
    "--refresh", is_flag=True, help="Look again for devices that came or went; asks the engine, and can take seconds."
)
@json_option
@pass_app
def command(app: App, refresh: bool, as_json: bool) -> None:
    """List what models can be loaded on: main memory, then accelerators, also those that cannot be used.

    FREE is what models can still get; MODELS is what those in memory hold or may still take, LEASED what `lm lease`
    keeps for others, and OTHERS what other programs use. Files that a model maps count as held, although the system can
    drop them. Below the table stands why a device is not used.

    \b
    Examples:
      lm devices
      lm devices --refresh
      lm devices --json | jq '.[] | select(.usable) | {id, free_bytes}'
    """
    from lmd.cli.output import print_json, print_table
    from lmd.cli.shapes import device_json
    from lmd.cli.terminal import one_line
    from lmd.cli.units import format_size
    from lmd.v1 import runtime_service_pb2 as pb

    with app.daemon() as client:
        devices = client.call(client.runtime.ListDevices, pb.ListDevicesRequest(refresh=refresh)).devices
    if as_json:
        print_json([device_json(device) for device in devices])
        return
    rows = [
        [
            device.id,
            device.description,
            format_size(device.total_bytes) if device.total_bytes else "",
            format_size(device.free_bytes) if device.usable else "",
            format_size(device.held_bytes),
            format_size(device.leased_bytes),
            format_size(device.others_bytes) if device.usable else "",
        ]
        for device in devices
    ]
    sizes = ("TOTAL", "FREE", "MODELS", "LEASED", "OTHERS")
    print_table(("DEVICE", "DESCRIPTION", *sizes), rows, right=sizes, optional=("LEASED", "OTHERS", "MODELS"))
    # Sentences, which in a column of their own would push the others off the screen.
    unused = [device for device in devices if not device.usable]
    if unused:
        click.echo()
    for device in unused:
        click.echo(f"{device.id} is not used: {one_line(device.reason)}")
