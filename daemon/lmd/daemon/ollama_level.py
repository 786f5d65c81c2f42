"""Which Ollama this gateway answers as."""

from __future__ import annotations

import re

from lmd.registry.errors import InvalidRequest

#: The release whose wire API the routes below `/api` follow. Clients read it to decide what they may send, so it is not
#: the version of the daemon: it rises when the routes, and `docs/reference/compatibility.md`, are held against a newer
#: release. Dot-separated integers and nothing else, which is all that clients parse.
API_LEVEL = "0.32.0"


def is_met(required: str) -> bool | None:
    """Tell whether `API_LEVEL` is at least *required*, of which a suffix such as `-rc1` does not count.

    None when that is no version.
    """
    found = re.fullmatch(r"v?(\d{1,9}(?:\.\d{1,9}){0,2})(?:-[0-9A-Za-z.-]+)?", required, re.ASCII)
    if found is None:
        return None
    wanted = [int(part) for part in found[1].split(".")]
    return [int(part) for part in API_LEVEL.split(".")] >= wanted


def check_required(version: str | None) -> None:
    """Refuse a model that needs a newer release. Raises: InvalidRequest."""
    if version is not None and not is_met(version):
        raise InvalidRequest(
            f"the model requires Ollama {version}, and this daemon answers as {API_LEVEL}",
            field="requires",
            hint="leave REQUIRES out to try it all the same",
        )
