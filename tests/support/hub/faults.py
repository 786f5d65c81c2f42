"""What can be made to go wrong with one file or repository."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Stage = Literal["api", "resolve", "data"]

ALWAYS = -1


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer *status* instead of the real thing: at the API, at resolve, or where the bytes are."""

    stage: Stage
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Silence:
    """Take a request and never answer."""

    stage: Stage


@dataclass(frozen=True, slots=True)
class Redirect:
    """Answer resolve with a redirect to *location*; "{self}" stands for the URL that was asked for."""

    location: str


@dataclass(frozen=True, slots=True)
class Lie:
    """Announce something else than what is served; `no_etag` leaves the linked ETag out."""

    size_bytes: int | None = None
    sha256: str | None = None
    no_etag: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """Close the connection after *after_bytes* of a body; with *reset*, by an RST."""

    after_bytes: int
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Stall:
    """Send *after_bytes* of a body, then nothing until the server stops."""

    after_bytes: int


@dataclass(frozen=True, slots=True)
class Drip:
    """Send one byte at a time, *bytes_per_s* of them."""

    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class NoRange:
    """Ignore Range: answer 200 with everything."""


@dataclass(frozen=True, slots=True)
class WrongStart:
    """Answer a range that starts *shift* bytes away from the one asked for."""

    shift: int


@dataclass(frozen=True, slots=True)
class Resize:
    """Serve *delta* bytes more (zeros) or fewer than the file has, and say so in every header of the data reply."""

    delta: int


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Flip all bits of the byte at *offset*."""

    offset: int


@dataclass(frozen=True, slots=True)
class Gzip:
    """Compress the body, whatever the client accepts."""


@dataclass(frozen=True, slots=True)
class Expire:
    """Once *after_bytes* of the file have been sent, refuse every URL signed before."""

    after_bytes: int


@dataclass(frozen=True, slots=True)
class Trigger:
    """Call *action* from the sending thread when *after_bytes* of the file have been sent, over all connections."""

    after_bytes: int
    action: Callable[[], object]


Fault = Answer | Redirect | Lie | Cut | Stall | Drip | NoRange | WrongStart | Resize | Corrupt | Gzip | Expire | Trigger
F = TypeVar("F")


@dataclass(slots=True)
class _Rule:
    repo: str
    filename: str | None
    fault: Fault
    left: int


class FaultTable:
    """The faults that are switched on. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[_Rule] = []

    def add(self, repo: str, filename: str | None, fault: Fault, times: int) -> None:
        """Switch on *fault* for the next *times* uses."""
        with self._lock:
            self._rules.append(_Rule(repo, filename, fault, times))

    def clear(self, repo: str | None = None) -> None:
        """Switch everything off, for one repository or for all."""
        with self._lock:
            self._rules = [rule for rule in self._rules if repo is not None and rule.repo != repo]

    def take(
        self, kind: type[F], repo: str, filename: str | None, matches: Callable[[F], bool] = lambda _: True
    ) -> F | None:
        """Return the first live fault of *kind* and use it up once."""
        with self._lock:
            for rule in self._rules:
                if rule.left == 0 or rule.repo != repo or (rule.filename is not None and rule.filename != filename):
                    continue
                if isinstance(rule.fault, kind) and matches(rule.fault):
                    if rule.left > 0:
                        rule.left -= 1
                    return rule.fault
        return None

    def all(self, kind: type[F], repo: str, filename: str | None) -> list[F]:
        """Return every live fault of *kind*, using none up."""
        with self._lock:
            return [
                rule.fault
                for rule in self._rules
                if rule.left != 0
                and rule.repo == repo
                and (rule.filename is None or rule.filename == filename)
                and isinstance(rule.fault, kind)
            ]
