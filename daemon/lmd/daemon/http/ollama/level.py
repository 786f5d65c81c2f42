"""Which Ollama this gateway answers as."""

from __future__ import annotations

import re

#: The release whose wire API the routes below `/api` follow. Clients read it to decide what they may send, so it is not
#: the version of the daemon: it rises when the routes, and `docs/reference/compatibility.md`, are held against a newer
#: release. Dot-separated integers and nothing else, which is all that clients parse.
API_LEVEL = "0.32.0"


def is_met(required: str) -> bool | None:
    """Tell whether `API_LEVEL` is at least *required*; None when that is no version."""
    if not re.fullmatch(r"v?\d{1,9}(\.\d{1,9}){0,2}", required, re.ASCII):
        return None
    wanted = [int(part) for part in required.removeprefix("v").split(".")]
    return [int(part) for part in API_LEVEL.split(".")] >= wanted
