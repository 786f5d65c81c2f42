"""One actor for each model: it alone loads, drains and unloads its runner, one thing after the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import structlog

from lmd.daemon.errors import AnswersTooLong, DeviceMemoryShort, DeviceUnavailable, Draining, Unloaded
from lmd.daemon.residency.decisions import Refusal
from lmd.daemon.residency.ledger import RECHECK_S
from lmd.daemon.residency.loading import Loaded
from lmd.daemon.residency.queueing import check_room
from lmd.daemon.residency.standing import Standing
from lmd.daemon.residency.ticket import Ticket
from lmd.daemon.residency.values import LoadSettings, RunnerState
from lmd.daemon.runner_process import RunnerProcess
from lmd.registry.errors import BlobMissing, LmdError

log = structlog.get_logger(__name__)


class ModelActor(Standing):
    """The runner of one manifest, and the queue in front of it.

    All state changes happen on the event loop, between awaits of the actor's own task or in plain calls from others;
    so a request never joins a runner that has been told to go, and an idle timer never fires under a request.
    """

    # Requests

    def enqueue(
        self,
        settings: LoadSettings,
        keep_alive: timedelta | None,
        caller: str = "",
        *,
        again: bool = False,
        batch: bool = False,
    ) -> Ticket:
        """Give a request a place; it is admitted at once when the model is ready and nobody waits.

        A request that had a place before and was handed back is not counted *again*. A *batch* can wait for others.

        Raises:
            QueueFull: too many wait, in all or of this caller.
            Draining: the daemon shuts down.
            ModelIncompatible, TemplateFailed: the engine has refused the model a moment ago.
        """
        self._check_open()
        if not again:
            check_room(self._limits, self._requests.waiting, self._runner, caller)
        if self.state is RunnerState.READY and not (self._requests.admitted or self._requests.waiting):
            self._requests.note_pause(self._keep_alive.last_used)
        wish = self._keep_alive.begin(caller, keep_alive)
        ticket = Ticket(self, settings.within(self.model.header.context_length), wish, caller, batch=batch)
        self._requests.add(ticket)
        self._admit_waiting()
        self._on_traffic()
        self._wake.set()
        return ticket

    def preload(self, settings: LoadSettings) -> None:
        """Load the model even when nobody waits for it any more."""
        if self._runner is None:
            self._preload = settings.within(self.model.header.context_length)
        self._keep_alive.note_use()

    def give_back(self, ticket: Ticket) -> None:
        """Free a ticket's place or its hold on the runner."""
        served = self._requests.give_back(ticket)
        self._keep_alive.end(ticket.wish, served=served)
        if served:
            self._ledger.changed()
        self._on_traffic()
        # It may have been all that kept those behind it from the runner.
        self._admit_waiting()
        self._wake.set()

    # Others

    def evict(self, reason: str) -> None:
        """Leave because someone needs the memory; a busy runner stays."""
        if not self.usage().busy and self._runner is not None:
            self._depart(reason)

    def yield_turn(self, reason: str) -> None:
        """Take no new requests, let those that run finish, and leave; those that wait, load the model again.

        What only waits for a slot of the runner is handed back, and waits with them. A turn that nobody could take
        for as long as a load may wait is called off.
        """
        if self._runner is None or self._leave:
            return
        self._yielding = True
        self._depart(reason)
        handed_back = self._runner.hand_back()
        log.info("turn_yielded", model=self.model.name, handed_back=handed_back, running=len(self._requests.admitted))

    def keep_turn(self) -> None:
        """Call a turn off that is not over yet: nobody wants it any more."""
        if self._yielding and self._leave:
            self._leave = self._yielding = False
            self._ledger.keeps_turn(self.key)
            self._wake.set()

    def unload(self, *, force: bool, save_kv: bool = True) -> int:
        """Leave when the running answers are done, or cut them; return how many there are.

        KV is saved unless *force* or not *save_kv*.
        """
        running = len(self._requests.admitted)
        self._saves_kv = self._saves_kv and save_kv
        self._preload = None
        self._yielding = False
        self._force = self._force or force
        if force:
            self._requests.refuse(Unloaded(self.model.name))
        first = "1 running answer finishes first" if running == 1 else f"{running} running answers finish first"
        self._depart(first if running and not force else "is unloaded")
        return running

    def close(self) -> None:
        """Take no new requests, drain, and end."""
        self._closing = True
        self._yielding = False
        self._drain_until = self._loop.time() + self._limits.drain_s
        self._preload = None
        self._requests.refuse(Draining())
        self._depart("the daemon shuts down")

    def cut(self) -> None:
        """End the time of running answers, once `close` has begun it."""
        self._drain_until = self._loop.time()
        self._wake.set()

    async def released(self) -> None:
        """Wait until the present runner is gone."""
        if self._runner is not None:
            await self._released.wait()

    # What a load tells

    @property
    def waits_since(self) -> float | None:
        """When the first of those who wait came, on the loop's clock."""
        return self._requests.waits_since

    @property
    def priority(self) -> int:
        """How urgently those who wait want the model."""
        return self._requests.asking_priority

    def note_phase(self, reason: str, patient: bool) -> None:
        """Note what the load waits for, and whether leaving off now loses no work."""
        self._patient = patient
        self._show(reason=reason)
        self._wake.set()

    def note_progress(self, fraction: float) -> None:
        """Note how much of the weights is read."""
        # No event for each: while there is progress there is nothing to explain.
        self._fraction, self.reason = fraction, ""
        self._on_traffic()

    def wait_begins(self) -> float:
        """Start the clock of those who wait; return when the first of them gives up."""
        self._preload_until = self._loop.time() + self._limits.wait_s
        self._requests.start_clock()
        return self._wait_ends() or self._preload_until

    def wait_is_over(self, error: DeviceMemoryShort) -> float | None:
        """Refuse those whose time is up; return when the next one gives up, None when nobody is left."""
        refused = self._requests.refuse_late(error)
        if refused and self._requests.waiting and self._target() != self._loading:
            self._anew = True
            self._wake.set()
        return self._wait_ends()

    def _wait_ends(self) -> float | None:
        """Return when the next one gives up the wait for memory: a request, or who wanted it loaded beforehand."""
        if (deadline := self._requests.deadline()) is not None:
            return deadline
        wanted = self._preload is not None and self._loop.time() < self._preload_until
        return self._preload_until if wanted else None

    # The actor's own task

    async def run(self) -> None:
        """Live until there is nothing to hold, to load or to show."""
        try:
            while (step := self._next_step()) is not None:
                await step()
        except Exception as error:
            log.exception("residency_actor_failed", model=self.model.name)
            self._requests.refuse(error)
            raise
        finally:
            self._on_end(self)
            if self._runner is not None:
                self._runner.kill(Draining)
                await self._runner.gone()
            self._ledger.release(self.key)

    def _next_step(self) -> Callable[[], Awaitable[None]] | None:
        if self._runner is not None:
            if self._runner.exit.done():
                return self._bury
            return self._unload if self._has_to_go() else self._rest
        if self._closing:
            return None
        if self._requests.waiting or self._preload is not None:
            return self._load
        if self.state is RunnerState.FAILED and self._loop.time() < self._shown_until():
            return self._rest
        return None

    async def _rest(self) -> None:
        """Sleep until something happens, or until the next deadline."""
        deadline = None
        if self._runner is None:
            deadline = self._shown_until()
        elif not self._requests.admitted and self._pin is None:
            deadline = self._keep_alive.expires_at()
        await self._woken(deadline)

    async def _load(self) -> None:
        """Load the runner that those who wait need; leave off when it is not wanted any more."""
        self._loading = settings = self._target()
        self._show(RunnerState.LOADING, "starts the runner", anew=True)
        self._load_started, self._load_s = time.time(), None
        started = self._loop.time()
        attempt = asyncio.create_task(self._bring_up(settings))
        attempt.add_done_callback(lambda _: self._wake.set())
        try:
            while not attempt.done():
                if self._load_is_unwanted():
                    attempt.cancel()
                    await asyncio.wait([attempt])
                else:
                    await self._woken(None)
        finally:
            attempt.cancel()
            await asyncio.wait([attempt])
            self._loading, self._fraction, self._patient, self._anew = None, None, False, False
        self._preload = None
        if attempt.cancelled():
            self._forget()
            return
        if (error := attempt.exception()) is not None:
            self._note_failure(error, settings)
            return
        self._loaded = attempt.result()
        self._runner = self._loaded.runner
        self._released = asyncio.Event()
        self._runner.exit.add_done_callback(lambda _: self._wake.set())
        self._load_s = self._loop.time() - started
        self._loaded_at = self._loop.time()
        self._requests.note_loaded()
        self._requests.stop_clock()
        self._pin_fits = True
        self._show(RunnerState.READY, self._loaded.remark)
        self._keep_alive.note_use()
        log.info("model_loaded", model=self.model.name, load_s=round(self._load_s, 3), device=self._loaded.device)
        if self._leave:
            # An unload that came during the load lets those who waited be served first.
            self._requests.admit_all(self._runner, self._serves)
            self._depart("is unloaded")
        self._admit_waiting()
        self._ledger.changed()

    async def _bring_up(self, settings: LoadSettings) -> Loaded:
        if (pause_s := self._backoff.pause_s()) > 0:
            self._patient = True
            self._show(reason=f"waits {pause_s:.1f} s after a failure")
            await asyncio.sleep(pause_s)
            self._patient = False
        return await self._loader.load(self.model, settings, self)

    async def _unload(self) -> None:
        """Drain and end the runner; stop doing so when the reason goes away."""
        runner, name = self._runner, self.model.name
        assert runner is not None
        if self._reloads() and not await self._reload_fits(runner):
            return
        drains = bool(self._requests.admitted)
        self._show(RunnerState.DRAINING, self._why_it_goes())
        self._ledger.changed()
        turn_ends = self._loop.time() + self._limits.wait_s
        if self._requests.admitted:
            self._requests.start_clock()
        while self._requests.admitted and not self._force and not runner.exit.done():
            if not self._has_to_go():
                self._serve_on()
                return
            now = self._loop.time()
            if self._closing and now >= self._drain_until:
                break
            if self._yielding and now >= turn_ends:
                # By now whoever the turn was for has given up, and those who wait here shall not.
                self.keep_turn()
                continue
            deadline = turn_ends if self._yielding else self._requests.deadline(keep=self._only_queues)
            if deadline is not None and now >= deadline:
                purpose = "is loaded again" if self._leave else "is loaded with other settings"
                error = AnswersTooLong(name, timeout_s=self._limits.wait_s, log=runner.log_tail(), purpose=purpose)
                self._requests.refuse_late(error, keep=self._only_queues)
                continue
            await self._woken(self._drain_until if self._closing else deadline)
        # While answers finished, others may have taken the memory, or whoever it would have been enough for has left.
        if drains and self._reloads() and not await self._reload_fits(runner):
            return
        # A runner that answers nobody has nothing to finish: one that does not go at once is stuck.
        patient = not self._requests.admitted and not self._force
        drain_s = min(self._limits.drain_s, self._loader.timings.term_s) if patient else 0.0
        saves_kv = self._saves_kv and self._loaded is not None and self._loaded.saves_kv
        cut = Draining if self._closing else lambda: Unloaded(name)
        await runner.stop(drain_s=drain_s, save_s=self._limits.save_s if saves_kv else 0.0, cut=cut)
        await runner.gone()
        log.info("model_unloaded", model=name)
        self._forget()

    async def _reload_fits(self, runner: RunnerProcess) -> bool:
        """Tell whether the runner goes, refusing those who need a reload for which there is no memory.

        It serves on while the planner is asked, and afterwards whoever needs no such reload.
        """
        while self._reloads() and not runner.exit.done():
            settings = self._target()
            question = asyncio.create_task(self._reload_refusal(runner, settings))
            question.add_done_callback(lambda _: self._wake.set())
            try:
                while not question.done() and self._reloads() and not runner.exit.done():
                    await self._woken(None)
            finally:
                question.cancel()
                await asyncio.wait([question])
            if question.cancelled() or not self._reloads() or self._target() != settings:
                continue
            if (refusal := question.result()) is None:
                return True
            if refusal.settling:
                await self._settled(refusal)
                continue
            log.info("reload_refused", model=self.model.name, num_ctx=settings.num_ctx, reason=refusal.reason)
            self._requests.refuse_larger(refusal.error, settings, keep=self._serves)
            self._admit_waiting()
        if self._leave or runner.exit.done():
            return self._leave
        self._serve_on()
        return False

    async def _reload_refusal(self, runner: RunnerProcess, settings: LoadSettings) -> Refusal | None:
        """Return why there is no memory for the model with *settings* once its runner is gone, None when there is."""
        try:
            ask = await self._loader.ask(self.model, settings, gpu_offload=runner.hello.result().gpu_offload)
        except LmdError as error:
            return Refusal(error)
        return await self._ledger.refusal(ask)

    async def _settled(self, refusal: Refusal) -> None:
        """Wait for a reading that may say something else; refuse those whose time is up."""
        self._requests.start_clock()
        self._show(reason=refusal.reason)
        self._requests.refuse_late(refusal.error, keep=self._only_queues)
        deadline = self._requests.deadline(keep=self._only_queues)
        look_again = self._loop.time() + RECHECK_S
        await self._woken(look_again if deadline is None else min(deadline, look_again))

    def _serve_on(self) -> None:
        """Go on with the runner: there is no reason any more why it should leave."""
        self._show(RunnerState.READY, self._loaded.remark if self._loaded is not None else "")
        self._requests.stop_clock()
        self._requests.narrow = False
        self._admit_waiting()

    async def _bury(self) -> None:
        """Note that the runner died by itself; its requests know already."""
        assert self._runner is not None
        ended = self._runner.exit.result()
        if self._runner.served:
            self._backoff.reset()
        await self._runner.gone()
        leaving, settings = self._leave, self._loaded.settings if self._loaded is not None else None
        self._forget()
        if not leaving:
            self._backoff.note_failure()
            self._fail(f"died ({ended.cause})")
            if self._pin is not None and not self._closing:
                self._preload = settings

    # State

    def _load_is_unwanted(self) -> bool:
        """A load that nobody waits for any more goes on once it reads the weights: the next one may want it."""
        if self._closing or self._force:
            return True
        if self._anew and self._patient:
            return True
        return not self._requests.waiting and (self._leave or (self._patient and self._preload is None))

    def _only_queues(self, ticket: Ticket) -> bool:
        """Tell whether a ticket is served as soon as those before it have given up that the model is reloaded."""
        return not self._leave and self._serves(ticket)

    def _target(self) -> LoadSettings:
        """Return settings that serve as many of those who wait as possible, and the pin."""
        others = [self._preload, self._pin if self._pin_fits else None]
        return self._requests.target(*(other for other in others if other is not None))

    def _check_open(self) -> None:
        if self._closing:
            raise Draining
        if (refusal := self._backoff.refusal()) is not None:
            raise refusal

    def _has_to_go(self) -> bool:
        if self._leave:
            return True
        if self._requests.waiting:
            return not self._serves(self._requests.first)
        return not self._requests.admitted and self._pin is None and self._keep_alive.expired()

    def _reloads(self) -> bool:
        """Tell whether the runner has to go for another one with other settings, and for nothing else."""
        return not self._leave and bool(self._requests.waiting) and self._has_to_go()

    def _why_it_goes(self) -> str:
        if self._leave:
            return self.reason
        return (
            "reloads with other settings when the running answers are done"
            if self._requests.waiting
            else "was not used"
        )

    def _admit_waiting(self) -> None:
        """Admit from the front of the queue as long as the runner serves them."""
        if self.state is not RunnerState.READY or self._runner is None or self._runner.exit.done():
            return
        self._requests.admit_front(self._runner, self._serves)

    def _depart(self, reason: str) -> None:
        """Begin to leave, from this very moment: whoever asks now waits for the next load."""
        self._leave = True
        self._show(RunnerState.DRAINING if self._runner is not None else None, reason)
        self._wake.set()

    def _note_failure(self, error: BaseException, settings: LoadSettings) -> None:
        if not isinstance(error, LmdError):
            raise error
        if self._pin is not None and isinstance(error, DeviceMemoryShort):
            # It was ready with less before it was asked for more: that it gets again, and not more.
            self._pin_fits = settings.num_ctx > self._pin.num_ctx
            self._preload = self._pin if self._pin_fits else None
        if isinstance(error, DeviceMemoryShort) and not error.waited_s:
            self._requests.refuse_larger(error, settings)
        elif isinstance(error, DeviceMemoryShort):
            # Who came while this was on its way has not waited yet.
            self._requests.refuse_late(error)
        else:
            self._requests.refuse(error)
        self._forget()
        if not isinstance(error, DeviceMemoryShort | DeviceUnavailable | BlobMissing):  # the runner is not to blame
            self._backoff.note_failure(error)
        self._fail(error.message)

    async def _woken(self, deadline: float | None) -> None:
        """Wait for a change, at most until *deadline* on the loop's clock."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._wake.wait()
        except TimeoutError:
            return
        finally:
            self._wake.clear()
