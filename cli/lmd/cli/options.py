"""Options and argument types that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmd.cli.units import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.shell_completion import CompletionItem

    from lmd.cli.client import Client

COMPLETION_TIMEOUT_S = 0.5


class DurationType(click.ParamType[float]):
    """A duration such as "5m", "1h30m", "90" (seconds) or "-1" (for ever), as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse *value*."""
        try:
            return parse_duration(str(value))
        except ValueError:
            self.fail(f"`{value}` is no duration; write `30s`, `5m`, `1h30m`, or `-1` for ever", param, ctx)


class SizeType(click.ParamType[int]):
    """A size such as "8GiB", "8G" or "500MB", as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse *value*."""
        try:
            return parse_size(str(value))
        except ValueError:
            self.fail(f"`{value}` is no size; write `8GiB`, `500MiB` or `20GB`", param, ctx)


class ModelType(click.ParamType[str]):
    """A model reference; a relative path is made absolute. Completes to the names a running daemon knows."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the reference as any process understands it: the daemon has another working directory."""
        text = str(value)
        path = text.removeprefix("file:")
        if path.startswith(("./", "../", "~/")):
            return os.path.realpath(os.path.expanduser(path))
        return text

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Ask a daemon that runs already; start none, wait for none, and say nothing when it fails."""
        from click.shell_completion import CompletionItem

        from lmd.cli.errors import ClientError

        try:
            names = _from_daemon(ctx.find_root().params.get("socket"), lambda client: self._names(client, incomplete))
        except ClientError:
            return []
        return [CompletionItem(name) for name in names]

    def _names(self, client: Client, prefix: str) -> list[str]:
        from lmd.v1 import model_service_pb2 as pb

        request = pb.ListModelsRequest(prefix=prefix)
        reply = client.call(lambda message: client.models.ListModels(message, timeout=COMPLETION_TIMEOUT_S), request)
        return [model.name for model in reply.models]


class ResidentType(ModelType):
    """A model reference that completes to the names of what is in memory; *pinned* to those that are pinned."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned

    def _names(self, client: Client, prefix: str) -> list[str]:
        from lmd.v1 import runtime_service_pb2 as pb

        request = pb.ListRunnersRequest()
        reply = client.call(lambda message: client.runtime.ListRunners(message, timeout=COMPLETION_TIMEOUT_S), request)
        resident = [runner.name for runner in reply.runners if runner.pinned or not self._pinned]
        return [name for name in resident if name.startswith(prefix.lower())]


def _from_daemon(explicit: Path | None, names: Callable[[Client], list[str]]) -> list[str]:
    from lmd.cli.endpoints import find_daemon, place_from

    socket = find_daemon(place_from(os.environ, explicit))
    if socket is None:
        return []
    from lmd.cli.client import Client

    with Client.connect(socket, timeout_s=COMPLETION_TIMEOUT_S) as client:
        return names(client)


MODEL = ModelType()
RESIDENT = ResidentType()
PINNED = ResidentType(pinned=True)
DURATION = DurationType()
SIZE = SizeType()

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
