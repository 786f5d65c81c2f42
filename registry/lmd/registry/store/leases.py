"""Leases: temporary roots of garbage collection."""

from __future__ import annotations

import logging
import secrets
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lmd.registry.digest import Digest
from lmd.registry.errors import DiskFull
from lmd.registry.store.gate import Gate
from lmd.registry.store.tables import LeaseTable

log = logging.getLogger(__name__)


class Lease:
    """Protects digests, of blobs or of manifests with all they refer to, until released; a context manager.

    A lease that somebody in this process holds does not expire, so a slow pull keeps what it has. When the process
    dies, the lease goes on for its time to live, so that the pull finds its blobs when it is resumed; the lease of the
    resumed pull, which has the same owner, takes it along when it is released. Thread-safe.
    """

    def __init__(self, leases: Leases, lease_id: str, owner: str, ttl_s: float) -> None:
        self.id = lease_id
        self.owner = owner
        self.ttl_s = ttl_s
        self._leases = leases

    def add(self, *digests: Digest) -> None:
        """Protect *digests* too, whether they are there yet or not; durable when it returns. Raises: StoreError."""
        self._leases.hold(self, digests)

    def release(self) -> None:
        """Protect nothing any more; harmless when repeated. Raises: StoreError."""
        self._leases.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Leases:
    """All leases of a store; thread-safe."""

    def __init__(self, table: LeaseTable, gate: Gate, clock: Callable[[], float]) -> None:
        self._table = table
        self._gate = gate
        self._clock = clock
        # Those whose holder is alive: one that was dropped without release falls back to its expiry.
        self._held: weakref.WeakValueDictionary[str, Lease] = weakref.WeakValueDictionary()
        # Those that ended when the disk was too full to say so.
        self._ended: set[str] = set()

    def new(self, owner: str, ttl_s: float) -> Lease:
        """Start a lease."""
        lease = Lease(self, secrets.token_hex(8), owner, ttl_s)
        with self._gate.change():
            self._table.add(lease.id, owner, self._clock() + ttl_s)
            self._held[lease.id] = lease
        return lease

    def hold(self, lease: Lease, digests: tuple[Digest, ...]) -> None:
        """Add to a lease, and start its time to live anew."""
        with self._gate.change(), self._table.together():
            self._table.extend({lease.id: self._clock() + lease.ttl_s})
            self._table.hold(lease.id, digests)

    def release(self, lease: Lease) -> None:
        """End a lease, and those that dead processes left to the same owner."""
        with self._gate.change():
            if self._held.pop(lease.id, None) is not None:
                self._ended.add(lease.id)
                try:
                    with self._table.together():
                        self._table.drop_of_owner(lease.owner, set(self._held))
                        self._drop_ended()
                except DiskFull as error:
                    # Releasing often ends what just filled the disk; that error is the one to be told.
                    log.warning("the lease of %s is dropped once there is room: %s", lease.owner, error)
                else:
                    self._ended.clear()

    def protected(self) -> set[Digest]:
        """List what leases protect now."""
        return self._table.protected(self._clock(), alive=set(self._held), ended=self._ended)

    def renew(self) -> None:
        """Start the time to live of all held leases anew, and drop those that expired."""
        with self._gate.change():
            with self._table.together():
                now = self._clock()
                held = list(self._held.values())
                self._table.extend({lease.id: now + lease.ttl_s for lease in held})
                self._table.drop_expired(now, {lease.id for lease in held})
                self._drop_ended()
            self._ended.clear()

    def _drop_ended(self) -> None:
        for lease_id in self._ended:
            self._table.drop(lease_id)
