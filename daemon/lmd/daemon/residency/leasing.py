"""Leases of memory: a program that is not ours gets memory of a device for as long as it runs.

To the ledger a lease is one more resident that is never a victim. What the program itself has taken shows in the
machine's figures already, so only the rest of the lease is set aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from lmd.daemon.errors import DeviceMemoryShort, Draining, LeaseMemoryShort
from lmd.daemon.process_memory import ProcessTree, used_bytes
from lmd.daemon.residency.decisions import LEASE_PREFIX, Usage
from lmd.daemon.residency.facts import Pool
from lmd.daemon.residency.ledger import Ledger
from lmd.daemon.residency.plans import CPU, Ask, DeviceMemory, Held
from lmd.daemon.tasks import give_up
from lmd.registry.errors import InvalidRequest, size_text

log = structlog.get_logger(__name__)

#: A lease waits for as long as its caller does, who can hang up at any time; no wait is without an end, though.
MAX_WAIT_S = 24 * 3600.0
MAX_PURPOSE = 200
#: How often a lease that waits for others looks for memory that came free otherwise.
RECHECK_S = 2.0


@dataclass(frozen=True, slots=True)
class LeaseWaiting:
    """A lease waits; *detail* says for what, in words."""

    detail: str


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """A lease holds *size_bytes* of *device* now."""

    device: str
    size_bytes: int


class _Lease:
    """One lease. *used_bytes* is what its processes took since it was asked for, as it was looked at last."""

    def __init__(self, name: str, device: str, size_bytes: int, tree: ProcessTree | None) -> None:
        self.name = name
        self.device = device
        self.size_bytes = size_bytes
        self.tree = tree
        self.bus_id = ""
        self.before_bytes = 0
        self.used_bytes = 0
        self.waits_for = ""
        self.changed = asyncio.Event()

    def note_wait(self, detail: str) -> None:
        if detail != self.waits_for:
            self.waits_for = detail
            self.changed.set()


class Leases:
    """Grants leases, in the order in which the ledger grants memory, and ends them when their callers leave.

    Use it from the event loop only.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        read_devices: Callable[[], Awaitable[Sequence[DeviceMemory]]],
        pool: Pool,
        bus_id_of: Callable[[str], Awaitable[str]],
        measure: Callable[[ProcessTree, str, str], int] = used_bytes,
    ) -> None:
        self._ledger = ledger
        self._read_devices = read_devices
        self._pool = pool
        self._bus_id_of = bus_id_of
        self._measure = measure
        self._leases: dict[str, _Lease] = {}
        self._numbers = itertools.count(1)
        self._draining = asyncio.Event()
        self._ended = asyncio.Event()

    async def hold(
        self, size_bytes: int, *, device: str = "", purpose: str = "", tree: ProcessTree | None = None
    ) -> AsyncGenerator[LeaseWaiting | LeaseGranted, None]:
        """Hold memory until the generator is closed: yield what it waits for, then once that it holds it.

        Idle models leave for it, busy ones and other leases are waited for. *device* is the accelerator with the most
        memory, or main memory, when it is empty. What *tree* takes from now on counts as a part of the lease.

        Raises:
            InvalidRequest: there is no such device, or nothing to hold.
            LeaseMemoryShort: the device cannot have that much, whoever leaves.
            Draining: the daemon shuts down; also to those who hold one.
        """
        if size_bytes <= 0:
            raise InvalidRequest("a lease needs a size above 0 bytes", field="bytes")
        if self._draining.is_set():
            raise Draining
        chosen = _choose(await self._read_devices(), device)
        name = " ".join(purpose.split())[:MAX_PURPOSE] or "a program"
        lease = _Lease(name, chosen, size_bytes, tree)
        if tree is not None:
            lease.bus_id = await self._bus_id_of(chosen)
            lease.before_bytes = await self._pool.run(self._measure, tree, chosen, lease.bus_id)
        key = f"{LEASE_PREFIX}{next(self._numbers)}"
        self._leases[key] = lease
        admitted = asyncio.create_task(self._admit(key, lease), name=key)
        drained = asyncio.create_task(self._draining.wait())
        admitted.add_done_callback(lambda _: lease.changed.set())
        drained.add_done_callback(lambda _: lease.changed.set())
        try:
            while not admitted.done() and not drained.done():
                await lease.changed.wait()
                lease.changed.clear()
                if lease.waits_for and not admitted.done():
                    yield LeaseWaiting(lease.waits_for)
            if drained.done():
                raise Draining
            admitted.result()
            log.info("lease_granted", lease=name, device=chosen, size_bytes=size_bytes)
            yield LeaseGranted(chosen, size_bytes)
            await drained
            raise Draining
        finally:
            # Without an await: a call that ends is often cancelled once more while it cleans up.
            admitted.cancel()
            drained.cancel()
            del self._leases[key]
            if self._ledger.holding(key) is not None:
                self._ledger.release(key)
                self._ended.set()
                self._ended = asyncio.Event()
                log.info("lease_ended", lease=name, device=chosen, size_bytes=size_bytes)
            await give_up(admitted)
            await give_up(drained)

    def drain(self) -> None:
        """End all leases, and grant no more: their callers are told."""
        self._draining.set()

    async def look(self) -> None:
        """Look at what the processes of leases use now; whoever reads the devices looks at the same time."""
        for lease in [lease for lease in self._leases.values() if lease.tree is not None]:
            assert lease.tree is not None
            used = await self._pool.run(self._measure, lease.tree, lease.device, lease.bus_id)
            lease.used_bytes = max(0, used - lease.before_bytes)

    def usage(self, key: str) -> Usage | None:
        """Say what a lease does, for the planner; None when *key* is no lease.

        It is pinned: a model that waited for its end would wait for a program of which nothing is known.
        """
        lease = self._leases.get(key)
        if lease is None:
            return None
        return Usage(
            busy=True,
            last_used=asyncio.get_running_loop().time(),
            pinned=True,
            leaving=False,
            grown_bytes=min(lease.used_bytes, lease.size_bytes),
        )

    def leased_bytes(self, device: str) -> int:
        """Return what leases hold of a device."""
        held = (self._ledger.holding(key) for key, lease in self._leases.items() if lease.device == device)
        return sum(resident.held_bytes for resident in held if resident is not None)

    async def _admit(self, key: str, lease: _Lease) -> None:
        """Get the memory from the ledger; wait for other leases as well, which nobody else does."""
        ask = Ask.of_bytes(key, lease.name, lease.size_bytes, lease.device)
        while True:
            ended = self._ended
            try:
                placed = await self._ledger.admit(
                    ask, timeout_s=MAX_WAIT_S, on_wait=lambda plan: lease.note_wait(plan.reason)
                )
                # Unlike a model it does not load: what it has taken is known at any time.
                self._ledger.settle(key, [Held(part.device, part.bytes, part.bytes) for part in placed.shares])
                return
            except DeviceMemoryShort as error:
                if ended.is_set():
                    continue
                free_bytes = int(error.metadata["free_bytes"])
                if free_bytes + self.leased_bytes(lease.device) < lease.size_bytes:
                    raise LeaseMemoryShort(
                        needed_bytes=lease.size_bytes, free_bytes=free_bytes, device=lease.device
                    ) from error
            lease.note_wait(f"waits for memory of {lease.device} that other leases hold: {self._held(lease.device)}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_S):
                    await ended.wait()

    def _held(self, device: str) -> str:
        holding = [lease for key, lease in self._leases.items() if self._ledger.holding(key) is not None]
        return ", ".join(
            f"{size_text(lease.size_bytes)} for `{lease.name}`" for lease in holding if lease.device == device
        )


def _choose(devices: Sequence[DeviceMemory], asked: str) -> str:
    if asked:
        if all(device.id != asked for device in devices):
            known = ", ".join(device.id for device in devices)
            raise InvalidRequest(f"there is no device `{asked[:100]}`", field="device", hint=f"the devices are {known}")
        return asked
    accelerators = [device for device in devices if device.id != CPU]
    return max(accelerators, key=lambda device: device.total_bytes).id if accelerators else CPU
