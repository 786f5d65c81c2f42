"""How long a model stays after its last use."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from lmd.daemon.residency.values import FOR_EVER, MAX_KEEP_ALIVE


class KeepAlive:
    """The keep-alive in effect for one runner, and its timer.

    The latest value that a request asks for wins. Requests that do not ask leave it as it is, so a client that knows
    nothing of keep-alives does not shorten what another one asked for. The end of the runner brings the default back.
    """

    def __init__(self, default: timedelta) -> None:
        self._default = _bounded(default)
        self._value = self._default
        self._last_used = self._now()

    @property
    def for_ever(self) -> bool:
        """Whether the model stays until it is unloaded by hand."""
        return self._value == FOR_EVER

    @property
    def last_used(self) -> float:
        """When it was last used, on the loop's clock."""
        return self._last_used

    def note_request(self, asked: timedelta | None) -> None:
        """Take over what a request asks for."""
        if asked is not None:
            self._value = _bounded(asked)

    def note_use(self) -> None:
        """Start the timer again."""
        self._last_used = self._now()

    def reset(self) -> None:
        """Forget what requests asked for."""
        self._value = self._default

    def expires_at(self) -> float | None:
        """Return when an idle model has to go, on the loop's clock; None for never."""
        return None if self.for_ever else self._last_used + self._value.total_seconds()

    def expired(self) -> bool:
        """Whether an idle model has to go now."""
        expires_at = self.expires_at()
        return expires_at is not None and self._now() >= expires_at

    def expiry_time(self) -> datetime | None:
        """Return when an idle model has to go, for people."""
        expires_at = self.expires_at()
        if expires_at is None:
            return None
        return datetime.now(UTC) + timedelta(seconds=max(0.0, expires_at - self._now()))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _bounded(value: timedelta) -> timedelta:
    return FOR_EVER if value < timedelta(0) else min(value, MAX_KEEP_ALIVE)
