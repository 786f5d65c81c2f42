"""What residency says of a runner, made up."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from lmd.daemon.residency.values import RunnerState, RunnerStatus
from lmd.registry.digest import Digest

_READY = RunnerStatus(
    name="m:latest",
    digest=Digest.of(b""),
    state=RunnerState.READY,
    memory_bytes=1,
    vram_bytes=0,
    device="cpu",
    context_length=64,
    slots=1,
    slots_busy=0,
    queued=0,
    expires_at=None,
    keep_forever=False,
    pid=1,
    load_started_at=datetime(2026, 1, 2, tzinfo=UTC),
    load_duration=None,
    reason="",
)


def runner_status(**values: Any) -> RunnerStatus:
    """Return the status of a runner that is ready and idle, with *values* in place of its own."""
    return replace(_READY, **values)
