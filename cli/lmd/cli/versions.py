"""Versions of models on the command line: "qwen3@2" is the second version of qwen3."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any

import click

from lmd.cli.errors import ClientError
from lmd.cli.options import COMPLETION_TIMEOUT_S
from lmd.cli.units import format_span

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from lmd.cli.client import Client
    from lmd.v1 import model_pb2
    from lmd.v1 import model_service_pb2 as pb

_VERSIONED = re.compile(r"(?P<name>.+)@(?P<number>[1-9][0-9]{0,8})")


def split_version(text: str) -> tuple[str, int]:
    """Split "qwen3@2" into the reference and the number of the version; 0 where there is none."""
    found = _VERSIONED.fullmatch(text)
    return (found["name"], int(found["number"])) if found else (text, 0)


def get_info(client: Client, text: str) -> model_pb2.ModelInfo:
    """Return everything about the model or version that *text* means.

    Raises:
        ClientError: there is none, or its bytes are no longer kept.
    """
    from lmd.v1 import model_service_pb2 as pb

    name, number = split_version(text)
    return client.call(client.models.GetModel, pb.GetModelRequest(name=name, version=number)).info


def one_before(client: Client, text: str) -> tuple[str, str]:
    """Return the version before the one that *text* means, and that one, both with their numbers.

    Raises:
        ClientError: there is no such model or version.
    """
    from lmd.v1 import model_service_pb2 as pb

    name, number = split_version(text)
    versions = client.call(client.models.ListVersions, pb.ListVersionsRequest(name=name)).versions
    number = number or versions[0].number
    if number == 1:
        raise ClientError(
            f"`{name}` has no version before {'this one' if len(versions) == 1 else 'the first'}",
            reason="VERSION_NOT_FOUND",
            hint="name two models to compare",
            metadata={"name": name, "version": "0"},
        )
    return f"{name}@{number - 1}", f"{name}@{number}"


def kept_text(version: pb.Version) -> str:
    """Return whether a version can be had, and for how long that is sure."""
    from lmd.cli.shapes import enum_text, unix_time

    state = enum_text(version, "state")
    if state != "kept":
        return state
    left_s = unix_time(version.spared_until_time) - time.time()
    return f"for {format_span(left_s)}" if left_s > 0 else "until collected"


def how_text(version: pb.Version) -> str:
    """Return how a version came about, in words."""
    return f"{version.how} {version.detail}".strip()


class VersionType(click.ParamType[int]):
    """The number of a version; completes to those of the model named before it that are kept."""

    name = "version"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse *value*."""
        if isinstance(value, int):
            return value
        if not re.fullmatch(r"[1-9][0-9]{0,8}", str(value)):
            self.fail(f"`{value}` is no number of a version; `lm history` shows them", param, ctx)
        return int(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Ask a daemon that runs already; say nothing when it fails."""
        from click.shell_completion import CompletionItem

        try:
            versions = _versions(ctx, str(ctx.params.get("model", "")))
        except ClientError:
            return []
        return [
            CompletionItem(str(version.number), help=how_text(version))
            for version in versions
            if str(version.number).startswith(incomplete) and kept_text(version) not in ("current", "gone")
        ]


def _versions(ctx: click.Context, name: str) -> list[pb.Version]:
    from lmd.cli.endpoints import find_daemon, place_from

    socket = find_daemon(place_from(os.environ, ctx.find_root().params.get("socket")))
    if socket is None:
        return []
    from lmd.cli.client import Client
    from lmd.v1 import model_service_pb2 as pb

    with Client.connect(socket, timeout_s=COMPLETION_TIMEOUT_S) as client:
        request = pb.ListVersionsRequest(name=name)
        reply = client.call(lambda message: client.models.ListVersions(message, timeout=COMPLETION_TIMEOUT_S), request)
    return list(reply.versions)


VERSION = VersionType()
