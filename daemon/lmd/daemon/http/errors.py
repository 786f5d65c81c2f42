"""HTTP statuses of domain errors: one table for all adapters."""

from __future__ import annotations

import math

from lmd.daemon.errors import Draining
from lmd.registry.errors import LmdError

#: What nginx calls a client that hung up; nobody reads it but the log and the counters.
CLIENT_CLOSED_REQUEST = 499
#: After how long a daemon that shuts down is worth another try: about what a restart takes.
RESTART_S = 5

STATUSES: dict[str, int] = {
    "INVALID_MODEL_REF": 400,
    "INVALID_ARGUMENT": 400,
    "MODELFILE_SYNTAX": 400,
    "MODEL_NOT_FOUND": 404,
    "SOURCE_NOT_FOUND": 404,
    "SOURCE_ACCESS_DENIED": 403,
    "SOURCE_UNAVAILABLE": 503,
    "SOURCE_RATE_LIMITED": 429,
    "SOURCE_INVALID": 502,
    "DOWNLOAD_DIGEST_MISMATCH": 502,
    "BLOB_MISSING": 500,
    "BLOB_CORRUPT": 500,
    "GGUF_INVALID": 400,
    "FILE_INVALID": 400,
    "FILE_CHANGED": 409,
    "TAG_CHANGED": 409,
    "VERSION_NOT_FOUND": 404,
    "UPLOAD_REQUIRED": 400,
    "NOT_PINNED": 409,
    "DISK_SPACE": 507,
    "DEVICE_MEMORY": 503,
    "DEVICE_UNAVAILABLE": 503,
    "MODEL_INCOMPATIBLE": 500,
    "RUNNER_CRASHED": 500,
    "RUNNER_START_TIMEOUT": 504,
    "RUNNER_HUNG": 500,
    "ENGINE_FAILED": 500,
    "CONTEXT_LENGTH_EXCEEDED": 400,
    "TEMPLATE_FAILED": 500,
    "CAPABILITY_MISSING": 400,
    "QUEUE_FULL": 503,
    "DEADLINE_EXCEEDED": 504,
    "CLIENT_STALLED": CLIENT_CLOSED_REQUEST,
    "PULL_CANCELLED": CLIENT_CLOSED_REQUEST,
    "DRAINING": 503,
    "UNLOADED": 503,
    "PERMISSION_DENIED": 403,
    "STORE_IO": 500,
    "INTERNAL": 500,
}


def status_of(error: LmdError) -> int:
    """Return the HTTP status of *error*."""
    return STATUSES[error.reason]


def retry_after(error: LmdError) -> str:
    """Return the value of a Retry-After header, whole seconds; empty when waiting does not help."""
    if isinstance(error, Draining):
        return str(RESTART_S)
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    return "" if retry_after_s is None else str(max(math.ceil(retry_after_s), 1))
