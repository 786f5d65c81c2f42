"""`lm du`."""

from __future__ import annotations

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import MODEL, json_option


@click.command("du", short_help="Show what takes space in the store")
@click.argument("prefix", type=MODEL, required=False, default="")
@json_option
@pass_app
def command(app: App, prefix: str, as_json: bool) -> None:
    """Show how much space each model takes, largest first, and what the whole store takes.

    OWN is what only this name needs, so what `lm rm` would free; SHARED is what other names need as well, such as the
    weights of a model and of those that are created from it. Shared bytes are on the disk once. What only earlier
    versions need is a part of the blobs; `lm gc --history 0` frees it.

    \b
    Examples:
      lm du
      lm du --json | jq .blob_bytes
    """
    from lmd.cli.listing import all_models
    from lmd.cli.output import print_facts, print_json, print_table
    from lmd.cli.units import format_size
    from lmd.v1 import store_service_pb2 as pb

    with app.daemon() as client:
        models = sorted(all_models(client, prefix), key=lambda model: (-model.size_bytes, model.name))
        usage = client.call(client.store.GetDiskUsage, pb.GetDiskUsageRequest())
    if as_json:
        listed = [
            {
                "name": model.name,
                "size_bytes": model.size_bytes,
                "own_bytes": model.own_bytes,
                "shared_bytes": model.size_bytes - model.own_bytes,
            }
            for model in models
        ]
        sums = {field.name: getattr(usage, field.name) for field in usage.DESCRIPTOR.fields if field.name != "models"}
        print_json({"models": listed, **sums})
        return
    rows = [
        (
            model.name,
            format_size(model.size_bytes),
            format_size(model.own_bytes),
            format_size(model.size_bytes - model.own_bytes),
        )
        for model in models
    ]
    print_table(("NAME", "SIZE", "OWN", "SHARED"), rows, right=("SIZE", "OWN", "SHARED"))
    sizes = [
        ("blobs", usage.blob_bytes),
        ("versions", usage.version_bytes),
        ("unfinished", usage.ingest_bytes),
        ("quarantine", usage.quarantined_bytes),
        ("saved KV", usage.kv_bytes),
        ("free", usage.free_bytes),
    ]
    facts = [(name, format_size(size)) for name, size in sizes if size or name in ("blobs", "free")]
    click.echo()
    print_facts([("Store", facts)])
