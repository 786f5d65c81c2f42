"""The ledger of memory: who holds how much of which device, and who may load next."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import structlog

from lmd.daemon.errors import DeviceMemoryShort
from lmd.daemon.residency.decisions import LEASE_PREFIX, Decision, Picture, Refusal, Usage
from lmd.daemon.residency.planner import plan
from lmd.daemon.residency.plans import CPU, Action, Ask, DeviceMemory, Held, Placement, Plan, Resident
from lmd.daemon.residency.reasons import seconds_text
from lmd.daemon.residency.refusals import devices_gone, too_large, waited_too_long
from lmd.daemon.residency.turns import again_s, next_change_s, stay_s

log = structlog.get_logger(__name__)

#: A driver shows the memory of a dead process as used for a moment.
GPU_SETTLE_S = 3.0
#: A runner takes more for a moment when its load ends: buffers that are copied, state that is read back.
LOAD_SETTLE_S = 2.0
#: So does the kernel, of main memory; it is not refused for good before that is over.
RELEASE_S = 2.0
#: Memory that other programs give back does not notify us.
RECHECK_S = 0.5
#: Clocks are read a moment after a time is up, never a moment before.
CLOCK_SLACK_S = 0.001
#: How many decisions are remembered.
REMEMBERED = 100


@dataclass(eq=False, slots=True)
class _Asking:
    """An ask that waits for its answer."""

    ask: Ask
    since: float
    deadline: float
    timeout_s: float
    priority: Callable[[], int]
    on_wait: Callable[[Plan], None]
    on_late: Callable[[DeviceMemoryShort], float | None]
    granted: asyncio.Future[Placement] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    decision: Decision | None = None

    def at(self, now: float) -> Ask:
        """Return the ask with the time it has waited, and how urgent it is by now."""
        return replace(self.ask, waited_s=now - self.since, priority=self.priority())


class Ledger:
    """Grants memory to loads and leases, asks idle models to leave and busy ones to yield.

    Those that wait are served by priority, and then in the order they came; but one that fits beside everything does
    not wait for one that does not. All decisions of a round are taken without an await between the picture of the
    machine and the entries in the ledger, so two loads never get the same bytes.
    """

    def __init__(
        self,
        *,
        read_devices: Callable[[], Awaitable[Sequence[DeviceMemory]]],
        reserve_bytes: int,
        usage: Callable[[str], Usage],
        evict: Callable[[str, str], None],
        yield_turn: Callable[[str, str], None],
        keep_turn: Callable[[str], None] = lambda key: None,
    ) -> None:
        """Make a ledger of nothing.

        *evict* tells an idle one why it has to leave. *yield_turn* tells a busy one to leave after its answers, and
        *keep_turn* that it need not do so after all.
        """
        self._read_devices = read_devices
        self._reserve_bytes = reserve_bytes
        self._usage = usage
        self._evict = evict
        self._yield_turn = yield_turn
        self._keep_turn = keep_turn
        self._holdings: dict[str, Resident] = {}
        self._asking: dict[str, _Asking] = {}
        self._promised: dict[str, Resident] = {}
        #: Who gives up its turn, and for whom.
        self._yielding: dict[str, str] = {}
        self._settling: list[tuple[float, Resident]] = []
        self._released_at = -math.inf
        #: Those that load, and until when: what they have taken already, a reading shows as well.
        self._unsettled: dict[str, float] = {}
        self._recent: deque[Decision] = deque(maxlen=REMEMBERED)
        self._version = 0
        self._changed = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None

    # What it knows

    def changed(self) -> None:
        """Tell that a resident became idle, busy or pinned; loads that wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def holding(self, key: str) -> Resident | None:
        """Return what *key* holds."""
        return self._holdings.get(key)

    def waiting(self) -> list[Decision]:
        """Return what waits now, in the order in which it is served."""
        now = asyncio.get_running_loop().time()
        return [
            replace(asking.decision, waited_s=now - asking.since)
            for asking in self._in_order()
            if asking.decision is not None
        ]

    def recent(self) -> list[Decision]:
        """Return what was decided last, latest first."""
        return list(reversed(self._recent))

    async def would(self, ask: Ask) -> Plan:
        """Return what would be decided for *ask* now; nothing changes. What it holds already counts as leaving."""
        return (await self.picture(ask.key)).plan(ask)

    async def picture(self, key: str) -> Picture:
        """Return the machine as it is for *key* now, whose own memory counts as leaving."""
        while True:
            version = self._version
            devices = await self._read_devices()
            if version == self._version:
                now = asyncio.get_running_loop().time()
                held = self._holdings.get(key)
                own = [replace(self._seen(held, self._usage(key), now), leaving=True)] if held is not None else []
                return Picture(tuple(devices), (*self._residents(key), *own), self._reserve_bytes)

    async def refusal(self, ask: Ask) -> Refusal | None:
        """Tell whether *ask* would be refused, with what it holds already counted as leaving; None when it would not.

        What is refused for good is remembered as a decision: who keeps what it has, does not ask for it.
        """
        picture = await self.picture(ask.key)
        others = [resident for resident in picture.residents if resident.key != ask.key]
        try:
            refused = picture.plan(ask)
            decided = self._once_settled(refused, picture.devices, picture.residents, ask)
        except ValueError:
            return Refusal(devices_gone(ask))
        if refused.action is not Action.REFUSE:
            return None
        error = self._too_large(ask, refused, others)
        if decided.action is not Action.REFUSE:
            return Refusal(error, settling=True, reason=decided.reason)
        self._remember(Decision(ask.name, refused, (), ask.waited_s, datetime.now(UTC)))
        return Refusal(error, reason=refused.reason)

    # What it grants

    async def admit(
        self,
        ask: Ask,
        *,
        timeout_s: float,
        on_wait: Callable[[Plan], None],
        until: float = math.inf,
        priority: Callable[[], int] | None = None,
        on_late: Callable[[DeviceMemoryShort], float | None] = lambda error: None,
    ) -> Placement:
        """Wait until *ask* may have its memory, making others leave for it; return the place. Cancel to leave.

        What it has waited before, in a queue, counts. *on_wait* is told the plan as long as it waits. What it gets
        counts as held until `release`.

        When *timeout_s* are over, or at *until* on the loop's clock, *on_late* is told and returns until when the rest
        of those who want it wait; None when nobody is left. *priority* is asked each time, where it may change.

        Raises:
            DeviceMemoryShort: it can never fit, or the memory stays in use until the deadline.
        """
        if ask.key in self._asking or ask.key in self._holdings:
            raise ValueError(f"{ask.key} has memory already, or asks for it")
        now = asyncio.get_running_loop().time()
        deadline = min(until, now + timeout_s)
        asking = _Asking(
            ask, now - ask.waited_s, deadline, timeout_s, priority or (lambda: ask.priority), on_wait, on_late
        )
        self._asking[ask.key] = asking
        self.changed()
        if self._rounds is None or self._rounds.done():
            self._rounds = asyncio.create_task(self._run_rounds(), name="ledger")
        try:
            return await asking.granted
        except asyncio.CancelledError:
            # It may have been answered in the moment in which whoever asked gave up.
            if asking.granted.done() and not asking.granted.cancelled():
                asking.granted.exception()
            self.release(ask.key)
            raise
        finally:
            del self._asking[ask.key]
            self._promised.pop(ask.key, None)
            if ask.key not in self._holdings:
                self._call_off_turns(ask.key)
            self.changed()

    def settle(self, key: str, held: Sequence[Held]) -> None:
        """Replace the estimate by what was measured, now that *key* is loaded."""
        self._holdings[key] = replace(self._holdings[key], held=tuple(held))
        if self._unsettled.get(key) == math.inf and not key.startswith(LEASE_PREFIX):
            self._unsettled[key] = asyncio.get_running_loop().time() + LOAD_SETTLE_S
        else:
            self._unsettled.pop(key, None)
        self._note_change()

    def keeps_turn(self, key: str) -> None:
        """Note that *key* goes on after all: the turn that it should have given up was called off."""
        self._yielding.pop(key, None)
        self.changed()

    def release(self, key: str) -> None:
        """Note that *key*'s process is gone. Idempotent."""
        self._yielding.pop(key, None)
        self._unsettled.pop(key, None)
        resident = self._holdings.pop(key, None)
        if resident is None:
            return
        self._released_at = asyncio.get_running_loop().time()
        late = tuple(replace(part, unseen_bytes=0) for part in resident.held if part.device != CPU)
        if late:
            until = asyncio.get_running_loop().time() + GPU_SETTLE_S
            self._settling.append((until, replace(resident, held=late, leaving=True)))
        self._note_change()

    def devices_of(self, key: str) -> tuple[str, ...]:
        """Return the devices of which *key* holds memory."""
        resident = self._holdings.get(key)
        return tuple(part.device for part in resident.held) if resident is not None else ()

    def tally(self, *, leases: bool) -> dict[str, tuple[int, int]]:
        """Return the bytes that models, or leases, hold of each device, and how many of them its readings show.

        Of a lease it is what its program has taken, as was looked at last. What models hold is safe from any thread.
        """
        sums: dict[str, tuple[int, int]] = {}
        for key, resident in list(self._holdings.items()):
            if key.startswith(LEASE_PREFIX) == leases:
                for part in resident.held:
                    held_bytes, seen_bytes = sums.get(part.device, (0, 0))
                    grown_bytes = self._usage(key).grown_bytes if leases else 0
                    seen_bytes += max(part.held_bytes - part.unseen_bytes, min(grown_bytes, part.held_bytes))
                    sums[part.device] = held_bytes + part.held_bytes, seen_bytes
        return sums

    async def evict_idle(self, key: str, *, timeout_s: float) -> bool:
        """Ask everyone idle but *key* to leave, and wait for it; tell whether there was anyone."""
        victims = [r.key for r in self._residents(key) if not (r.busy or r.pinned) and r.key in self._holdings]
        for victim in victims:
            self._evict(victim, "makes room after another model ran out of memory")
        try:
            async with asyncio.timeout(timeout_s):
                while any(victim in self._holdings for victim in victims):
                    await self._changed.wait()
        except TimeoutError:
            return False
        return bool(victims)

    # Rounds

    async def _run_rounds(self) -> None:
        """Decide for everybody who asks, as often as something changes."""
        while self._asking:
            version, changed, wake_s = self._version, self._changed, 0.0
            try:
                devices = await self._read_devices()
                if version != self._version:
                    continue
                wake_s = self._round(devices)
            except Exception as error:  # whoever asks has to know, whatever it is
                log.exception("residency_plan_failed")
                for asking in self._open():
                    asking.granted.set_exception(error)
            await _wait_event(changed, wake_s)
            await asyncio.sleep(0)  # those who were answered leave

    def _round(self, devices: Sequence[DeviceMemory]) -> float:
        """Decide for everybody who asks, in order; return when to look again."""
        now = asyncio.get_running_loop().time()
        self._promised.clear()
        wake_s = RECHECK_S
        for asking in self._open():
            ask = asking.at(now)
            residents = self._residents(ask.key)
            try:
                decided = plan(devices, residents, ask, reserve_bytes=self._reserve_bytes)
                decided = self._once_settled(decided, devices, residents, ask, late=now >= asking.deadline)
            except ValueError:
                asking.granted.set_exception(devices_gone(ask))
                continue
            late = now >= asking.deadline and decided.action not in (Action.LOAD, Action.REFUSE)
            given_up = late and not self._goes_on(asking, self._late(asking, decided, devices))
            if given_up:
                reason = f"gave up after {seconds_text(asking.timeout_s)}: {decided.reason}"
                decided = replace(decided, action=Action.REFUSE, reason=reason)
            self._note(asking, ask, decided, residents)
            if given_up:
                continue
            if decided.action is Action.LOAD:
                self._hold(ask, decided.placement)
                asking.granted.set_result(decided.placement)
            elif decided.action is Action.REFUSE:
                asking.granted.set_exception(self._too_large(ask, decided, residents))
            else:
                self._follow(asking, decided)
                wake_s = min(wake_s, asking.deadline - now, next_change_s(ask, residents) + CLOCK_SLACK_S)
        return wake_s

    def _once_settled(
        self,
        decided: Plan,
        devices: Sequence[DeviceMemory],
        residents: Sequence[Resident],
        ask: Ask,
        *,
        late: bool = False,
    ) -> Plan:
        """Make a wait of a refusal, or of a smaller context, that a reading of this moment may be wrong about.

        Of what loads, or did so a moment ago, a part may count twice: as promised, and as taken. Who is *late* takes
        the smaller context.
        """
        now = asyncio.get_running_loop().time()
        refused = decided.action is Action.REFUSE
        if not refused and (late or decided.placement.num_ctx >= ask.needs[0].num_ctx):
            return decided
        settling = any(until > now for until, _ in self._settling) or now < self._released_at + RELEASE_S
        hoped = plan(self._at_best(devices, now), residents, ask, reserve_bytes=self._reserve_bytes)
        if refused and (settling or hoped.action is not Action.REFUSE):
            return replace(decided, action=Action.WAIT, reason=f"waits until memory has settled: {decided.reason}")
        if not refused and hoped.placement.num_ctx > decided.placement.num_ctx:
            reason = f"waits until memory has settled: a context of {hoped.placement.num_ctx} tokens may fit then"
            return replace(hoped, action=Action.WAIT, others=(), holds_place=False, reason=reason)
        return decided

    def _at_best(self, devices: Sequence[DeviceMemory], now: float) -> list[DeviceMemory]:
        """Return the devices with all that may count twice as free."""
        self._unsettled = {key: until for key, until in self._unsettled.items() if until > now}
        twice_bytes: Counter[str] = Counter()
        for key in self._unsettled:
            for part in self._holdings[key].held:
                twice_bytes[part.device] += part.held_bytes
        return [replace(device, free_bytes=device.free_bytes + twice_bytes[device.id]) for device in devices]

    def _goes_on(self, asking: _Asking, late: DeviceMemoryShort) -> bool:
        """Tell those who have waited long enough; tell whether anybody waits on."""
        until = asking.on_late(late)
        if until is None:
            asking.granted.set_exception(late)
            return False
        asking.deadline = until
        return True

    def _follow(self, asking: _Asking, decided: Plan) -> None:
        ask = asking.ask
        if decided.holds_place:
            self._promised[ask.key] = _resident(ask, decided.placement)
        if decided.action is Action.EVICT:
            for victim in decided.others:
                self._evict(victim, f"makes room for `{ask.name}`")
        elif decided.action is Action.TURN:
            for busy in decided.others:
                self._yielding[busy] = ask.key
                self._yield_turn(busy, f"gives `{ask.name}` its turn when the running answers are done")
        asking.on_wait(decided)

    def _call_off_turns(self, key: str) -> None:
        """Let those go on that only left for *key*, which wants no memory any more."""
        for busy in [busy for busy, asking in self._yielding.items() if asking == key]:
            self._keep_turn(busy)

    def _residents(self, asking: str) -> list[Resident]:
        """Return everyone as the planner sees them; earlier asks that got a place count as loading already."""
        now = asyncio.get_running_loop().time()
        self._settling = [(until, resident) for until, resident in self._settling if until > now]
        residents = [resident for _, resident in self._settling]
        residents += [self._seen(held, self._usage(key), now) for key, held in self._holdings.items() if key != asking]
        residents += [promised for key, promised in self._promised.items() if key != asking]
        return residents

    def _seen(self, resident: Resident, usage: Usage, now: float) -> Resident:
        idle_s = 0.0 if usage.busy else max(0.0, now - usage.last_used)
        held, grown_bytes = [], usage.grown_bytes
        for part in resident.held:
            seen = min(part.unseen_bytes, grown_bytes)
            grown_bytes -= seen
            held.append(replace(part, unseen_bytes=part.unseen_bytes - seen))
        return replace(
            resident,
            held=tuple(held),
            busy=usage.busy,
            pinned=usage.pinned,
            leaving=usage.leaving or resident.key in self._yielding,
            idle_s=idle_s,
            stay_s=stay_s(idle_s=idle_s, reload_s=usage.reload_s, answer_s=usage.answer_s) if usage.shared else 0.0,
            again_s=again_s(pause_s=usage.pause_s, idle_s=idle_s, reload_s=usage.reload_s),
            resident_s=max(0.0, now - usage.loaded_at) if usage.loaded_at > 0 else 0.0,
            reload_s=usage.reload_s,
            answer_s=usage.answer_s,
            priority=usage.priority,
        )

    def _in_order(self) -> list[_Asking]:
        return sorted(self._asking.values(), key=lambda asking: (-asking.priority(), asking.since))

    def _open(self) -> list[_Asking]:
        return [asking for asking in self._in_order() if not asking.granted.done()]

    def _note(self, asking: _Asking, ask: Ask, decided: Plan, residents: Sequence[Resident]) -> None:
        """Remember a decision that differs from the last one for the same ask."""
        if decided.action is Action.LOAD and ask.key.startswith(LEASE_PREFIX):
            decided = replace(decided, action=Action.HOLD)
        names = {resident.key: resident.name or resident.key for resident in residents}
        others = tuple(names[key] for key in decided.others)
        made = Decision(ask.name, decided, others, ask.waited_s, datetime.now(UTC))
        last, asking.decision = asking.decision, made
        if last is not None and _gist(last.plan) == _gist(decided):
            return
        self._remember(made)

    def _remember(self, made: Decision) -> None:
        self._recent.append(made)
        decided = made.plan
        log.info(
            "residency_plan", model=made.name, action=decided.action.value, others=made.others, reason=decided.reason
        )

    def _late(self, asking: _Asking, decided: Plan, devices: Sequence[DeviceMemory]) -> DeviceMemoryShort:
        return waited_too_long(
            asking.ask,
            decided,
            devices,
            self._residents(asking.ask.key),
            reserve_bytes=self._reserve_bytes,
            waited_s=asking.timeout_s,
        )

    def _too_large(self, ask: Ask, refused: Plan, residents: Sequence[Resident]) -> DeviceMemoryShort:
        return too_large(ask, refused, residents, by_name=lambda key: self._usage(key).by_name)

    def _hold(self, ask: Ask, placement: Placement) -> None:
        self._holdings[ask.key] = _resident(ask, placement)
        self._unsettled[ask.key] = math.inf
        self._note_change()

    def _note_change(self) -> None:
        self._version += 1
        self.changed()


def _resident(ask: Ask, placement: Placement) -> Resident:
    """Return what gets a place: nothing of it is to be seen yet."""
    held = tuple(Held(share.device, share.bytes, share.bytes) for share in placement.shares)
    return Resident(ask.key, held, ask.name, busy=True, priority=ask.priority)


def _gist(decided: Plan) -> tuple[Action, tuple[str, ...], Placement]:
    return decided.action, decided.others, decided.placement


async def _wait_event(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
