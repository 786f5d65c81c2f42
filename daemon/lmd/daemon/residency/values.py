"""Values that residency takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Protocol

from lmd.daemon.adapter_scales import AdapterFile
from lmd.daemon.runner_stats import EngineStats
from lmd.registry.digest import Digest
from lmd.registry.gguf import GgufHeader
from lmd.registry.kv_types import DEFAULT_KV_TYPE, is_as_exact, most_exact
from lmd.registry.lm_config import Message
from lmd.registry.parameters import ParameterValue

#: A keep-alive that never ends; so does every negative one.
FOR_EVER = timedelta(seconds=-1)
#: Longer ones overflow calendars.
MAX_KEEP_ALIVE = timedelta(days=36_500)

MAX_PROMPT_BYTES = 32 << 20
TEMPLATE_TIMEOUT_S = 5.0

#: How long a runner that leaves may save KV. Somebody may wait for its memory, and a disk may be slow: at 500 MB/s this
#: is more than the default quota.
SAVE_S = 10.0


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
    def header(self) -> GgufHeader:
        """The header of the whole model."""

    @property
    def draft(self) -> tuple[Path, ...]:
        """The GGUF files of the model that drafts for it, all shards in order; () for none."""

    @property
    def draft_header(self) -> GgufHeader | None:
        """The header of that model."""

    @property
    def adapters(self) -> Sequence[AdapterFile]:
        """What is added to its weights."""

    @property
    def parameters(self) -> Mapping[str, ParameterValue]:
        """The settings that the manifest makes."""

    @property
    def template(self) -> str | None:
        """The chat template in effect."""

    @property
    def system(self) -> str | None:
        """The manifest's system prompt."""

    @property
    def messages(self) -> Sequence[Message]:
        """The messages that start every chat."""


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """The settings that take effect when a model is loaded; names and units as in `Parameters`.

    *min_ctx* is the smallest context that will do where nobody asked for one by name; 0: *num_ctx*, and no less.
    *wanted_ctx* is set of a model that was loaded with less than that, because no more fits.
    """

    num_ctx: int
    num_batch: int = 512
    num_gpu: int = -1
    num_thread: int = 0
    use_mmap: bool = True
    kv_type: str = DEFAULT_KV_TYPE
    min_ctx: int = 0
    wanted_ctx: int = 0

    def served_by(self, loaded: LoadSettings) -> bool:
        """Tell whether a model that was loaded with *loaded* can serve a request that asks for these.

        A larger context serves a smaller one. Batch size, threads and mapping change the speed and not the answer,
        so they wait for the next load: clients that differ in them do not take turns reloading the model. Keys and
        values in a more exact type serve those who would do with less.
        """
        has_ctx = self.num_ctx <= loaded.num_ctx
        # What was too large a moment ago is not tried again for a request that does with less.
        does = 0 < self.min_ctx <= loaded.num_ctx and self.num_ctx <= loaded.wanted_ctx
        exact = is_as_exact(loaded.kv_type, self.kv_type)
        return (has_ctx or does) and exact and self.num_gpu in (-1, loaded.num_gpu)

    def asks_less_than(self, refused: LoadSettings) -> bool:
        """Tell whether a request that asks for these may be served though there is no memory for *refused*."""
        return self.num_ctx < refused.num_ctx or self.num_gpu != refused.num_gpu

    def with_kv_type_of(self, others: Iterable[LoadSettings]) -> LoadSettings:
        """Return these with keys and values as exact as any of *others* wants them."""
        return replace(self, kv_type=most_exact(self.kv_type, *(other.kv_type for other in others)))

    def contexts(self) -> tuple[int, ...]:
        """Return the contexts that will do, the wanted one first: three quarters of it, half of it, and so on."""
        found = [self.num_ctx]
        whole = self.num_ctx
        while self.min_ctx and found[-1] > self.min_ctx:
            found.append(max(whole * 3 // 4 if found[-1] == whole else whole // 2, self.min_ctx))
            if found[-1] == whole // 2:
                whole //= 2
        return tuple(found)

    def within(self, train_ctx: int) -> LoadSettings:
        """Return what a runner makes of these: it keeps to the context the model was trained with (0: not known)."""
        if train_ctx <= 0:
            return self
        return replace(self, num_ctx=min(self.num_ctx, train_ctx), min_ctx=min(self.min_ctx, train_ctx))


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds an actor; seconds, except for the counts."""

    max_queue: int
    slots: int
    #: How long a reload waits for running answers, and a load for memory.
    wait_s: float
    drain_s: float
    #: How long a runner may save KV when it leaves.
    save_s: float = SAVE_S
    #: After the n-th failure in a row the next load waits backoff_s * 2 ** (n - 1), at most backoff_cap_s.
    backoff_s: float = 0.5
    backoff_cap_s: float = 30.0
    #: How long a failed runner stays listed.
    failed_s: float = 60.0

    @property
    def max_queue_of_caller(self) -> int:
        """How much of the queue one caller may fill; the rest is for others."""
        return max(1, self.max_queue * 3 // 4)


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
    stats: EngineStats | None = None
    pinned: bool = False
    #: What it holds of each device.
    shares: tuple[tuple[str, int], ...] = ()
    estimated_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a request has no answer yet.

    Attributes:
        queue_position: requests before this one.
        load_fraction: how far the load of the model is, from 0 to 1; None when it is not loading.
        detail: what the load waits for, in words.
    """

    queue_position: int
    load_fraction: float | None = None
    detail: str = ""
