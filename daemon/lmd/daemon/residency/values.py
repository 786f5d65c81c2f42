"""Values that residency takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Protocol

from lmd.registry.digest import Digest
from lmd.registry.gguf import GgufHeader

#: A keep-alive that never ends.
FOR_EVER = timedelta(seconds=-1)

MAX_PROMPT_BYTES = 32 << 20
TEMPLATE_TIMEOUT_S = 5.0


class Loadable(Protocol):
    """What residency has to know of a resolved model."""

    @property
    def name(self) -> str:
        """The canonical name."""

    @property
    def manifest_digest(self) -> Digest:
        """What identifies the model, whatever names point to it."""

    @property
    def weights(self) -> tuple[Path, ...]:
        """The GGUF files, all shards in order."""

    @property
    def headers(self) -> tuple[GgufHeader, ...]:
        """Their headers."""

    @property
    def template(self) -> str | None:
        """The chat template in effect."""


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """The settings that take effect when a model is loaded; names and units as in `Parameters`."""

    num_ctx: int
    num_batch: int = 512
    num_gpu: int = -1
    num_thread: int = 0
    use_mmap: bool = True

    def served_by(self, loaded: LoadSettings) -> bool:
        """Tell whether a model that was loaded with *loaded* can serve a request that asks for these.

        A larger context serves a smaller one. Batch size, threads and mapping change the speed and not the answer,
        so they wait for the next load: clients that differ in them do not take turns reloading the model.
        """
        return self.num_ctx <= loaded.num_ctx and self.num_gpu in (-1, loaded.num_gpu)


class RunnerState(Enum):
    """The life cycle of a runner as it is listed; see `Runner.State` of the API."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """One runner as `lm ps` shows it; see `Runner` of the API."""

    name: str
    digest: Digest
    state: RunnerState
    memory_bytes: int
    vram_bytes: int
    device: str
    context_length: int
    slots: int
    slots_busy: int
    queued: int
    expires_at: datetime | None
    keep_forever: bool
    pid: int
    load_started_at: datetime
    load_duration: timedelta | None
    reason: str


@dataclass(frozen=True, slots=True)
class WaitStatus:
    """Why a request has no answer yet.

    Attributes:
        queue_position: requests before this one.
        load_fraction: how far the load of the model is, from 0 to 1; None when it is not loading.
        detail: what the load waits for, in words.
    """

    queue_position: int
    load_fraction: float | None = None
    detail: str = ""
