"""How a model stands: what is known of its runner, and what others are told of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog

from lmd.daemon.residency.backoff import Backoff
from lmd.daemon.residency.decisions import Usage
from lmd.daemon.residency.keep_alive import KeepAlive
from lmd.daemon.residency.ledger import Ledger
from lmd.daemon.residency.loading import Loaded, Loader
from lmd.daemon.residency.requests import Requests
from lmd.daemon.residency.ticket import Ticket
from lmd.daemon.residency.values import Limits, Loadable, LoadSettings, RunnerState, RunnerStatus, Waiting
from lmd.daemon.runner_process import RunnerProcess
from lmd.registry.digest import Digest

log = structlog.get_logger(__name__)


class Standing:
    """What is known of one model's runner, told to the planner, to lists and to those who watch.

    Nothing here waits, and nothing decides what happens next: that is `ModelActor`'s.
    """

    def __init__(
        self,
        model: Loadable,
        *,
        keep_alive: timedelta,
        limits: Limits,
        ledger: Ledger,
        loader: Loader,
        on_released: Callable[[Digest], None],
        on_end: Callable[[Standing], None],
        on_change: Callable[[Standing], None] = lambda standing: None,
        on_traffic: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.key = str(model.manifest_digest)
        self.names = {model.name}
        self.state = RunnerState.LOADING
        self.reason = ""
        self.announced = False
        self._limits = limits
        self._ledger = ledger
        self._loader = loader
        self._on_released = on_released
        self._on_end = on_end
        self._on_change = on_change
        self._on_traffic = on_traffic
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._requests = Requests(limits.wait_s)
        self._runner: RunnerProcess | None = None
        self._released = asyncio.Event()
        self._loaded: Loaded | None = None
        self._loading: LoadSettings | None = None
        self._fraction: float | None = None
        self._patient = False
        self._preload: LoadSettings | None = None
        self._preload_until = 0.0
        #: Those that it loads for have changed: it begins anew, with what the others want.
        self._anew = False
        self._keep_alive = KeepAlive(keep_alive)
        self._backoff = Backoff(limits.backoff_s, limits.backoff_cap_s)
        self._failed_at = 0.0
        self._pin: LoadSettings | None = None
        self._pin_fits = True
        self._leave = False
        self._yielding = False
        self._force = False
        self._saves_kv = True
        self._closing = False
        self._drain_until = 0.0
        self._load_started = time.time()
        self._load_s: float | None = None
        self._loaded_at = 0.0

    # What is told

    @property
    def resident(self) -> bool:
        """Whether the model is loaded, or will be."""
        return (
            self._runner is not None
            or self._loading is not None
            or bool(self._requests.waiting)
            or self._preload is not None
        )

    @property
    def answering(self) -> bool:
        """Whether requests hold the runner."""
        return bool(self._requests.admitted)

    @property
    def name(self) -> str:
        """One of the names it is asked for by: the first, while that means this model."""
        return self.model.name if self.model.name in self.names else min(self.names, default=self.model.name)

    @property
    def loaded(self) -> Loaded | None:
        """The load that it serves with now."""
        return self._loaded

    def usage(self) -> Usage:
        """Say what the runner does, for the planner."""
        ready = self.state is RunnerState.READY
        leaving = self.state is RunnerState.DRAINING and not self._requests.admitted
        stats = self._runner.stats if self._runner is not None else None
        return Usage(
            busy=not leaving and (not ready or bool(self._requests.admitted) or bool(self._requests.waiting)),
            last_used=self._keep_alive.last_used,
            pinned=ready and (self._pin is not None or self._keep_alive.for_ever),
            leaving=leaving,
            by_name=self._pin is not None,
            grown_bytes=stats.parked_bytes if stats is not None else 0,
            queued=len(self._requests.waiting) + (self._runner.queued if self._runner is not None else 0),
            reload_s=self._loaded.reload_s if self._loaded is not None else 0.0,
            loaded_at=self._loaded_at if ready else 0.0,
            priority=self._requests.priority if ready else self._requests.asking_priority,
            pause_s=self._requests.pause_s,
            answer_s=self._requests.answers.mean_s,
            shared=self._requests.shared,
        )

    @property
    def pin(self) -> LoadSettings | None:
        """The settings that the model is pinned with; None for a model that may leave."""
        return self._pin

    @pin.setter
    def pin(self, settings: LoadSettings | None) -> None:
        pin = settings.within(self.model.header.context_length) if settings is not None else None
        if pin == self._pin:
            return
        if pin is None:
            self._keep_alive.note_use()
        self._pin, self._pin_fits = pin, True
        if self.state is RunnerState.FAILED:
            self._preload = pin
        self._ledger.changed()
        self._on_traffic()
        self._wake.set()

    def status(self) -> RunnerStatus:
        """Describe the runner."""
        held = self._ledger.holding(self.key)
        memory = self._loaded.memory if self._loaded is not None else None
        settings = self._loading or (self._loaded.settings if self._loaded is not None else None)
        idle = self.state is RunnerState.READY and not self._requests.admitted
        return RunnerStatus(
            name=self.name,
            digest=self.model.manifest_digest,
            state=self.state,
            memory_bytes=memory.total_bytes if memory is not None else held.held_bytes if held is not None else 0,
            vram_bytes=memory.vram_bytes if memory is not None else 0,
            device=self._loaded.device if self._loaded is not None else "",
            context_length=self._loaded.num_ctx if self._loaded is not None else settings.num_ctx if settings else 0,
            slots=self._limits.slots,
            slots_busy=self._runner.busy if self._runner is not None else 0,
            queued=len(self._requests.waiting) + (self._runner.queued if self._runner is not None else 0),
            expires_at=self._keep_alive.expiry_time() if idle and self._pin is None else None,
            keep_forever=self._pin is None and self._keep_alive.for_ever,
            pid=self._runner.pid if self._runner is not None else 0,
            load_started_at=datetime.fromtimestamp(self._load_started, UTC),
            load_duration=timedelta(seconds=self._load_s) if self._load_s is not None else None,
            reason=self.reason,
            stats=self._runner.stats if self._runner is not None else None,
            pinned=self._pin is not None,
            shares=tuple((part.device, part.held_bytes) for part in held.held) if held is not None else (),
            estimated_bytes=self._loaded.estimated_bytes if self._loaded is not None else 0,
        )

    def wait_status(self, ticket: Ticket) -> Waiting:
        """Say what a ticket waits for."""
        return Waiting(self._requests.position(ticket), self._fraction, self.reason)

    # What changes it

    def _show(self, state: RunnerState | None = None, reason: str | None = None, *, anew: bool = False) -> None:
        """Change what is listed, and tell those who watch; *anew* also when it was listed so before."""
        before = self.state, self.reason
        self.state = state or self.state
        self.reason = self.reason if reason is None else reason
        if anew or (self.state, self.reason) != before:
            self.announced = True
            self._on_change(self)

    def _fail(self, reason: str) -> None:
        self._failed_at = self._loop.time()
        self._show(RunnerState.FAILED, reason)
        log.warning("runner_failed", model=self.model.name, reason=reason, failures=self._backoff.failures)

    def _forget(self) -> None:
        """Nothing of a runner is left."""
        self._runner, self._loaded = None, None
        self._released.set()
        self._leave = self._force = self._yielding = False
        self._saves_kv = True
        if not self._requests.waiting:
            self._keep_alive.reset()
            self._requests.stop_clock()
        self._requests.admitted.clear()
        self._ledger.release(self.key)
        self._on_released(self.model.manifest_digest)

    # What follows from it

    def _serves(self, ticket: Ticket) -> bool:
        return self._loaded is not None and ticket.settings.served_by(self._loaded.settings)

    def _shown_until(self) -> float:
        return self._failed_at + self._limits.failed_s
