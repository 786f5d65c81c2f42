"""Unloading a model, with word of what is waited for where that takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from lmd.cli.client import Client
from lmd.cli.context import note
from lmd.cli.errors import ClientError
from lmd.cli.spinner import Spinner
from lmd.cli.terminal import progress_wanted, quiet_keyboard
from lmd.cli.ticking import BEAT_S, with_ticks
from lmd.v1 import runtime_service_pb2 as pb

#: A runner that ends in less needs no word.
QUIET_S = 1.0


def unload(client: Client, name: str, *, force: bool) -> pb.UnloadModelResponse:
    """Unload a model; after a second say on stderr that its runner is what is waited for.

    Raises:
        ClientError: it cannot be unloaded.
    """
    request = pb.UnloadModelRequest(name=name, force=force)

    def reply() -> Iterator[pb.UnloadModelResponse]:
        yield client.call(client.runtime.UnloadModel, request)

    spinner, beats, told = Spinner(sys.stderr), 0, False
    try:
        with quiet_keyboard():
            for event in with_ticks(reply()):
                if event is not None:
                    return event
                beats += 1
                if beats * BEAT_S < QUIET_S:
                    continue
                spinner.say(f"waiting for the runner of {name} to end")
                if not (told or spinner.visible) and progress_wanted():
                    note(f"waiting for the runner of {name} to end")
                told = True
    finally:
        spinner.clear()
    raise ClientError("the daemon gave no reply", reason="INTERNAL")
