"""The devices of this machine: what there is, what is free, and what went wrong with them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog

from lmd.daemon.devices.cpu import main_memory
from lmd.daemon.devices.drm import DrmCards
from lmd.daemon.devices.engine_probe import engine_backends, probe_engine
from lmd.daemon.devices.matching import Readings, devices_of, shortfall
from lmd.daemon.devices.nvidia import NvidiaCards
from lmd.daemon.devices.patience import PatientCards
from lmd.daemon.devices.values import Card, CardReader, Device, EngineDevice, Probed
from lmd.daemon.tasks import give_up

log = structlog.get_logger(__name__)

#: After a probe that failed, the next load asks again, but not before so long.
RETRY_S = 30.0
#: How often the drivers are asked when nobody else does, so that a device that fails is noticed.
LOOK_S = 5.0


@dataclass(frozen=True, slots=True)
class _Asked:
    """The engine's last answer, and how things were then."""

    probed: Probed
    held: Mapping[str, int] = field(default_factory=dict)
    cards: frozenset[str] = frozenset()


class Inventory:
    """Knows the devices. The engine is asked once, in a process that ends; afterwards drivers and kernel tell.

    Devices keep their ids as long as the daemon lives, also when the engine numbers them anew.

    *held* tells what our runners hold of each device now, for devices whose use nobody else can tell; it is called in
    threads. `devices`, `usable` and `shortfall` block for milliseconds and are thread-safe; the rest belongs to the
    event loop.
    """

    def __init__(
        self,
        *,
        cards: Sequence[CardReader] | None = None,
        probe: Callable[[], Awaitable[Probed]] = probe_engine,
        memory: Callable[[], Device] = main_memory,
        backends: Callable[[], frozenset[str]] = engine_backends,
        look_s: float = LOOK_S,
    ) -> None:
        self.held: Callable[[], Mapping[str, int]] = dict
        drivers: Sequence[CardReader] = (NvidiaCards(), DrmCards()) if cards is None else cards
        self._readers = [PatientCards(driver) for driver in drivers]
        self._probe = probe
        self._memory = memory
        self._backends = backends()
        self._asked: _Asked | None = None
        self._probing: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._look_s = look_s
        self._failed_at = 0.0
        #: Protects what was said of each device last.
        self._lock = threading.Lock()
        self._said: dict[str, str] = {}
        self._faults: Mapping[str, str] = {}

    def start(self) -> None:
        """Begin to ask the engine, unless it was built without any accelerator; and to watch what it finds."""
        if self._backends:
            self._ask()
            self._watching = asyncio.create_task(self._watch())
        else:
            self._asked = _Asked(Probed())

    async def stop(self) -> None:
        """Watch no more, and end a probe that still runs."""
        for task in (self._watching, self._probing):
            if task is not None:
                await give_up(task)

    async def known(self) -> None:
        """Wait until the engine has answered for the first time; ask again when that failed a while ago."""
        loop = asyncio.get_running_loop()
        failed = self._asked is not None and bool(self._asked.probed.fault)
        if self._asked is None or (failed and loop.time() >= self._failed_at + RETRY_S):
            await self._wait(self._ask())

    async def refresh(self) -> None:
        """Look for devices that came or went. Calls at the same time share one probe."""
        for reader in self._readers:
            reader.look_again()
        await self._wait(self._ask())

    def devices(self) -> list[Device]:
        """Return all devices as they are now, main memory first, also those that cannot be used."""
        asked = self._asked
        found = devices_of(
            Readings(
                probed=asked.probed if asked is not None else None,
                cards=self._cards(),
                memory=self._memory(),
                backends=self._backends,
                held=self.held(),
                held_then=asked.held if asked is not None else {},
                cards_then=asked.cards if asked is not None else frozenset(),
            )
        )
        if asked is not None:
            self._note(found)
        return found

    def usable(self) -> list[Device]:
        """Return the devices that models can be loaded on now, main memory first."""
        return [device for device in self.devices() if device.usable]

    def shortfall(self) -> str:
        """Say why models go to main memory although there is an accelerator; "" when one can be used, or none is."""
        return shortfall(self.devices())

    def faults(self) -> Mapping[str, str]:
        """Return what was wrong with devices that were usable before, as they were looked at last; never blocks."""
        return self._faults

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            await asyncio.to_thread(self.devices)

    def _ask(self) -> asyncio.Task[None]:
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._look())
        return self._probing

    async def _wait(self, probing: asyncio.Task[None]) -> None:
        """Wait for a probe that others may wait for, too."""
        await asyncio.shield(probing)

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        probed = await self._probe()
        held, cards = await asyncio.gather(asyncio.to_thread(self.held), asyncio.to_thread(self._cards))
        if probed.fault:
            self._failed_at = loop.time()
            log.warning("device_probe_failed", why=probed.fault)
            if self._asked is not None and not self._asked.probed.fault:
                return  # what is known is better than nothing; the drivers tell what is gone
        else:
            log.info(
                "devices_probed",
                devices=[device.id for device in probed.devices],
                took_s=round(loop.time() - began, 2),
            )
        known = self._asked.probed.devices if self._asked is not None else ()
        working = frozenset(card.bus_id for card in cards if card.bus_id and not card.fault)
        self._asked = _Asked(replace(probed, devices=keep_ids(known, probed.devices)), held, working)

    def _cards(self) -> list[Card]:
        return [card for reader in self._readers for card in reader.cards()]

    def _note(self, devices: Sequence[Device]) -> None:
        """Remember what became of devices, and log it once for each change."""
        with self._lock:
            faults = dict(self._faults)
            for device in devices:
                said = self._said.get(device.id)
                self._said[device.id] = device.reason
                if device.reason == (said or ""):
                    continue
                facts = {"device": device.id, "description": device.description}
                if not device.reason:
                    faults.pop(device.id, None)
                    log.info("device_usable_again", **facts)
                elif said == "":
                    faults[device.id] = device.reason
                    log.warning("device_lost", **facts, why=device.reason)
                else:
                    log.warning("device_unused", **facts, why=device.reason)
            self._faults = faults


def keep_ids(known: Sequence[EngineDevice], offered: Sequence[EngineDevice]) -> tuple[EngineDevice, ...]:
    """Return the *offered* devices, each with the id that the same card had among those *known*.

    A card that is new and whose id is taken by another gets the next number that is free.
    """
    ids = {(device.backend, device.bus_id): device.id for device in known if device.bus_id}
    kept = [replace(device, id=ids.get((device.backend, device.bus_id), "")) for device in offered]
    taken = {device.id for device in kept} | set(ids.values())
    named = []
    for device, before in zip(kept, offered, strict=True):
        if not device.id:
            own, number = before.id, 0
            while own in taken:
                own, number = f"{before.backend}{number}", number + 1
            taken.add(own)
            device = replace(device, id=own)
        named.append(device)
    return tuple(named)
