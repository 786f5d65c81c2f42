"""How long a model stays after its last use."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from lmd.daemon.residency.values import FOR_EVER, MAX_KEEP_ALIVE


@dataclass(slots=True)
class Wish:
    """How long one caller wants a model to stay: *value*, from the end of its last request on."""

    value: timedelta
    last_used: float
    open_requests: int = 0

    def ends_at(self) -> float | None:
        """Return when it has run out, on the loop's clock; None for never."""
        return None if self.value == FOR_EVER else self.last_used + self.value.total_seconds()


class KeepAlive:
    """The keep-alives in effect for one runner, and their timer.

    Each caller has a wish of its own: what it asked for last, or else the default. It runs from the end of that
    caller's last request, and the model stays until the last wish has run out; so nobody shortens what another caller
    asked for, and everybody can shorten what it asked for itself. The end of the runner ends all wishes.
    """

    def __init__(self, default: timedelta) -> None:
        self._default = _bounded(default)
        self._last_used = _now()
        self._wishes: dict[str, Wish] = {}

    @property
    def for_ever(self) -> bool:
        """Whether the model stays until it is unloaded by hand."""
        return any(wish.value == FOR_EVER for wish in self._in_effect())

    @property
    def last_used(self) -> float:
        """When it was last used, on the loop's clock."""
        return self._last_used

    def begin(self, caller: str, asked: timedelta | None) -> Wish:
        """Note a request and what it asks for; hand what this returns to `end`."""
        now = _now()
        self._wishes = {name: wish for name, wish in self._wishes.items() if not _ran_out(wish, now)}
        wish = self._wishes.setdefault(caller, Wish(self._default, now))
        if asked is not None:
            wish.value = _bounded(asked)
        wish.open_requests += 1
        return wish

    def end(self, wish: Wish, *, served: bool) -> None:
        """Note the end of a request. One that was not *served* leaves the caller's timer as it was."""
        wish.open_requests -= 1
        if served:
            self._last_used = wish.last_used = _now()

    def note_use(self) -> None:
        """Start all timers again: the model has just become ready, or loses what kept it."""
        self._last_used = _now()
        for wish in self._wishes.values():
            wish.last_used = self._last_used

    def reset(self) -> None:
        """Forget what was asked for."""
        self._wishes.clear()

    def expires_at(self) -> float | None:
        """Return when an idle model has to go, on the loop's clock; None for never."""
        ends = [wish.ends_at() for wish in self._in_effect()]
        known = [end for end in ends if end is not None]
        return max(known) if len(known) == len(ends) else None

    def expired(self) -> bool:
        """Whether an idle model has to go now."""
        expires_at = self.expires_at()
        return expires_at is not None and _now() >= expires_at

    def expiry_time(self) -> datetime | None:
        """Return when an idle model has to go, for people."""
        expires_at = self.expires_at()
        if expires_at is None:
            return None
        return datetime.now(UTC) + timedelta(seconds=max(0.0, expires_at - _now()))

    def _in_effect(self) -> list[Wish]:
        return list(self._wishes.values()) or [Wish(self._default, self._last_used)]


def _ran_out(wish: Wish, now: float) -> bool:
    ends_at = wish.ends_at()
    return not wish.open_requests and ends_at is not None and now >= ends_at


def _bounded(value: timedelta) -> timedelta:
    return FOR_EVER if value < timedelta(0) else min(value, MAX_KEEP_ALIVE)


def _now() -> float:
    return asyncio.get_running_loop().time()
