"""A store, a Hub and a puller with short waits, for tests of pulls."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from lmd.registry.aliases import AliasTable
from lmd.registry.pull import Puller, PullEvent, PullOptions, PullState
from lmd.registry.ref import parse_ref
from lmd.registry.retry import RetryPolicy
from lmd.registry.store import Store, TagRecord
from tests.support.hub import HubServer

#: No waits to speak of, and several connections from the first byte.
QUICK = PullOptions(
    stall_timeout_s=5.0,
    connect_timeout_s=5.0,
    retry=RetryPolicy(tries=4, base_s=0.005, cap_s=0.02, max_wait_s=2.0),
    join_after_s=0.0,
    step_bytes=256 << 10,
)


class Rig:
    """Pulls into a store of its own and keeps every event."""

    def __init__(self, hub: HubServer, root: Path, options: PullOptions = QUICK) -> None:
        self.hub = hub
        self.store = Store.open(root)
        self.aliases = AliasTable.load(None)
        self._pullers: list[Puller] = []
        self.puller = self.new_puller(options)
        self.events: list[PullEvent] = []

    def new_puller(self, options: PullOptions) -> Puller:
        """Return another puller on the same store and Hub."""
        puller = Puller(self.store, self.aliases, endpoint=self.hub.endpoint, user_agent="lmd-test/0", options=options)
        self._pullers.append(puller)
        return puller

    def pull(
        self,
        ref: str,
        *,
        token: str | None = None,
        cancelled: threading.Event | None = None,
        on_event: Callable[[PullEvent], None] = lambda _: None,
    ) -> TagRecord:
        """Pull a reference as the daemon would."""

        def note(event: PullEvent) -> None:
            self.events.append(event)
            on_event(event)

        return self.puller.pull(parse_ref(ref), token=token, on_event=note, cancelled=cancelled or threading.Event())

    def states(self) -> list[PullState]:
        """Return the states seen, each run of equal ones once."""
        seen: list[PullState] = []
        for event in self.events:
            if not seen or seen[-1] is not event.state:
                seen.append(event.state)
        return seen

    def close(self) -> None:
        """Stop what runs and close the store."""
        for puller in self._pullers:
            puller.close()
        self.store.close()


def sha256_of(data: bytes) -> str:
    """Return the digest of *data* as text."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
