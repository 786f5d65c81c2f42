"""The ledger of memory: who holds how much of which device, and who may load next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from lmd.daemon.errors import DeviceMemoryShort
from lmd.daemon.residency.planner import DeviceMemory, Evict, Load, Plan, Refuse, Resident, Wait, plan

#: A driver shows the memory of a dead process as used for a moment.
GPU_SETTLE_S = 3.0
#: How the keys of leases begin; those of models are digests.
LEASE_PREFIX = "lease "
#: Memory that other programs give back does not notify us.
RECHECK_S = 0.5


@dataclass(frozen=True, slots=True)
class Usage:
    """What a resident does now, as far as eviction cares.

    Attributes:
        busy: whether it serves, or loads for someone.
        last_used: when it was used last, on the loop's clock.
        pinned: whether it may not be evicted.
        leaving: whether it is on its way out already, with nobody left to finish.
        grown_bytes: what it has taken since it was loaded, of what it may take: the machine's figures show them.
        queued: requests that wait for it.
        reload_s: how long its last load took; 0 when that is not known.
        loaded_at: when it became ready, on the loop's clock; 0 while it is not.
        priority: who may take memory from whom: the lower goes first.
    """

    busy: bool
    last_used: float
    pinned: bool
    leaving: bool
    grown_bytes: int = 0
    queued: int = 0
    reload_s: float = 0.0
    loaded_at: float = 0.0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Option:
    """A set of equally good devices, and what the model would take on one of them."""

    devices: tuple[str, ...]
    needed_bytes: int


class Ledger:
    """Grants memory to loads, in the order they ask where they compete, and asks idle models to leave.

    A load that fits beside everything does not wait for one that does not. All decisions are taken without an await
    between the picture of the machine and the entry in the ledger, so two loads never get the same bytes.
    """

    def __init__(
        self,
        *,
        read_devices: Callable[[], Awaitable[Sequence[DeviceMemory]]],
        reserve_bytes: int,
        usage: Callable[[str], Usage],
        evict: Callable[[str, str], None],
        yield_turn: Callable[[str, str], None],
    ) -> None:
        """*evict* tells an idle one why it has to leave; *yield_turn* tells a busy one to leave after its answers."""
        self._read_devices = read_devices
        self._reserve_bytes = reserve_bytes
        self._usage = usage
        self._evict = evict
        self._yield_turn = yield_turn
        self._holdings: dict[str, Resident] = {}
        self._promised: dict[str, Resident] = {}
        self._settling: list[tuple[float, Resident]] = []
        self._version = 0
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Tell that a resident became idle, busy or pinned; loads that wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def holding(self, key: str) -> Resident | None:
        """Return what *key* holds."""
        return self._holdings.get(key)

    async def admit(
        self,
        key: str,
        name: str,
        options: Sequence[Option],
        *,
        timeout_s: float,
        on_wait: Callable[[tuple[str, ...]], None],
    ) -> str:
        """Wait until *key* may load, evicting for it; return the device it got. Cancel to leave.

        *options* are in order of preference; a later one is taken when the earlier ones are refused for good.
        *on_wait* is told who holds the memory.

        Raises:
            DeviceMemoryShort: it can never fit, or the memory stays in use until the deadline.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            while True:
                version, changed = self._version, self._changed
                devices = await self._read_devices()
                if version != self._version:
                    continue
                option, decision = self._decide(key, devices, options)
                if isinstance(decision, Load):
                    self._hold(key, decision.device, option.needed_bytes)
                    return decision.device
                settling = any(until > loop.time() for until, _ in self._settling)
                if isinstance(decision, Refuse) and not settling:
                    raise DeviceMemoryShort(
                        name,
                        needed_bytes=decision.needed_bytes,
                        free_bytes=decision.free_bytes,
                        device=decision.device,
                    )
                if loop.time() >= deadline:
                    raise self._waited_too_long(name, option, decision, devices)
                self._follow(key, option, decision, on_wait)
                await _wait_event(changed, min(RECHECK_S, max(0.0, deadline - loop.time())))
        finally:
            if self._promised.pop(key, None) is not None:
                self.changed()

    def settle(self, key: str, *, held_bytes: int, unseen_bytes: int) -> None:
        """Replace the estimate by what was measured, now that *key* is loaded."""
        self._holdings[key] = replace(self._holdings[key], held_bytes=held_bytes, unseen_bytes=unseen_bytes)
        self._note_change()

    def release(self, key: str) -> None:
        """Note that *key*'s process is gone. Idempotent."""
        held = self._holdings.pop(key, None)
        if held is None:
            return
        if held.device != "cpu":
            until = asyncio.get_running_loop().time() + GPU_SETTLE_S
            self._settling.append((until, replace(held, unseen_bytes=0, leaving=True)))
        self._note_change()

    def devices_of(self, key: str) -> tuple[str, ...]:
        """Return the devices of which *key* holds memory."""
        held = self._holdings.get(key)
        return (held.device,) if held is not None else ()

    def tally(self, *, leases: bool) -> dict[str, tuple[int, int]]:
        """Return the bytes that models, or leases, hold of each device, and how many of them its readings show.

        Safe from any thread.
        """
        sums: dict[str, tuple[int, int]] = {}
        for key, held in list(self._holdings.items()):
            if key.startswith(LEASE_PREFIX) == leases:
                held_bytes, seen_bytes = sums.get(held.device, (0, 0))
                seen = max(held.held_bytes - held.unseen_bytes, 0)
                sums[held.device] = held_bytes + held.held_bytes, seen_bytes + seen
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

    def _decide(self, key: str, devices: Sequence[DeviceMemory], options: Sequence[Option]) -> tuple[Option, Plan]:
        residents = self._residents(key)
        refused: tuple[Option, Plan] | None = None
        for option in options:
            usable = [device for device in devices if device.id in option.devices]
            if not usable:
                continue
            decision = plan(usable, residents, needed_bytes=option.needed_bytes, reserve_bytes=self._reserve_bytes)
            if not isinstance(decision, Refuse):
                return option, decision
            refused = option, decision
        if refused is None:
            raise ValueError("no option names a device of this machine")
        return refused

    def _residents(self, asking: str) -> list[Resident]:
        """Return everyone as the planner sees them; earlier loads that evict count as loading already."""
        now = asyncio.get_running_loop().time()
        self._settling = [(until, resident) for until, resident in self._settling if until > now]
        residents = [resident for _, resident in self._settling]
        for key, held in self._holdings.items():
            usage = self._usage(key)
            residents.append(
                replace(
                    held,
                    busy=usage.busy,
                    last_used=usage.last_used,
                    pinned=usage.pinned,
                    leaving=usage.leaving,
                    unseen_bytes=max(0, held.unseen_bytes - usage.grown_bytes),
                )
            )
        for key, promised in self._promised.items():
            if key == asking:
                break
            residents.append(promised)
        return residents

    def _follow(self, key: str, option: Option, decision: Plan, on_wait: Callable[[tuple[str, ...]], None]) -> None:
        if isinstance(decision, Evict):
            needed = option.needed_bytes
            self._promised.setdefault(key, Resident(key, decision.device, needed, unseen_bytes=needed, busy=True))
            for victim in decision.victims:
                self._evict(victim, "makes room for another model")
            on_wait(decision.victims)
        elif isinstance(decision, Wait):
            on_wait(tuple(holder for holder in decision.holders if holder in self._holdings))

    def _waited_too_long(
        self, name: str, option: Option, decision: Plan, devices: Sequence[DeviceMemory]
    ) -> DeviceMemoryShort:
        device = next(device for device in devices if device.id == decision.device)
        return DeviceMemoryShort(
            name,
            needed_bytes=option.needed_bytes,
            free_bytes=max(0, device.free_bytes - self._reserve_bytes),
            device=decision.device,
            hint="other models answer with that memory; try again when they are done, or stop one with `lm stop`",
        )

    def _hold(self, key: str, device: str, needed_bytes: int) -> None:
        self._holdings[key] = Resident(key, device, needed_bytes, unseen_bytes=needed_bytes, busy=True)
        self._note_change()

    def _note_change(self) -> None:
        self._version += 1
        self.changed()


async def _wait_event(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
