"""Which files the daemon opens for whom."""

from __future__ import annotations

import os
from pathlib import Path

from lmd.daemon.callers import Caller
from lmd.daemon.errors import UploadRequired
from lmd.registry.errors import InvalidRequest
from lmd.registry.ref import FileRef, ModelRef, parse_ref


def check_may_open(path: Path, caller: Caller, field: str) -> None:
    """Refuse to open a path for a caller who might not be able to: the daemon reads with its own rights.

    Raises:
        UploadRequired: the caller is another user.
        InvalidRequest: the path is relative, and to what only the client knows.
    """
    if caller.uid != os.geteuid():
        raise UploadRequired
    if not path.is_absolute():
        raise InvalidRequest(f"the path `{path}` is not absolute", field=field, hint="give the whole path from `/`")


def pull_ref(text: str, caller: Caller) -> ModelRef:
    """Return what *caller* asks to pull.

    Raises: InvalidRef, and for files UploadRequired and InvalidRequest.
    """
    ref = parse_ref(text)
    if isinstance(ref, FileRef):
        check_may_open(ref.path, caller, "ref")
    return ref
