"""Pulling a model while someone watches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from click.exceptions import Exit

from lmd.cli.context import announce, note
from lmd.cli.errors import EXIT_INTERRUPTED, ClientError
from lmd.cli.progress import Reporter, reporter_for
from lmd.cli.terminal import quiet_keyboard
from lmd.cli.ticking import with_ticks
from lmd.cli.units import format_elapsed, format_size
from lmd.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from lmd.cli.client import Client
    from lmd.v1 import model_pb2


def token_from_environment() -> str:
    """Return the user's Hub token, which reaches also a daemon that was started without it."""
    return os.environ.get("HF_TOKEN", "").strip()


def pull(client: Client, ref: str) -> model_pb2.Model:
    """Pull *ref* and return the model, with progress on stderr. Ctrl-C hangs up and says what becomes of the pull.

    Raises:
        ClientError: the pull fails.
        Exit: the user left.
    """
    started_at = time.monotonic()
    started = pb.PullStarted()
    request = pb.PullModelRequest(ref=ref, token=token_from_environment())
    try:
        with (
            quiet_keyboard(),
            closing(reporter_for()) as reporter,
            client.stream(client.models.PullModel, request) as events,
        ):
            model = _watch(events, reporter, started)
    except KeyboardInterrupt:
        note(_left(ref, started))
        raise Exit(EXIT_INTERRUPTED) from None
    took = format_elapsed(time.monotonic() - started_at)
    announce("pulled", model.name, f"{format_size(model.size_bytes)} in {took}")
    return model


def _watch(events: Iterable[pb.PullModelResponse], reporter: Reporter, started: pb.PullStarted) -> model_pb2.Model:
    for event in with_ticks(events):
        if event is None:
            reporter.refresh()
            continue
        match event.WhichOneof("event"):
            case "started":
                started.CopyFrom(event.started)
                joined = ", which is under way already" if started.joined else ""
                reporter.status(f"pulling {started.name}{joined}")
            case "progress":
                reporter.progress(event.progress)
            case "model":
                return event.model
    raise ClientError("the daemon ended the pull without a result", reason="INTERNAL")


def _left(ref: str, started: pb.PullStarted) -> str:
    if started.joined:
        return f"left the pull of {started.name}; it goes on while others watch it"
    return f"stopped; what arrived is kept, and `lm pull {ref}` goes on from there"
