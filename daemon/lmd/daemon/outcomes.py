"""How a request ends: noted by whoever knows, read at the door through which the request came.

Every request that enters through gRPC or HTTP has an `Outcome`. A failure that the door cannot see, because it is told
inside of a stream that began well, is noted with `note_failure` where it is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lmd.registry.errors import LmdError
from lmd.v1.error_reason_pb2 import ErrorReason

_PREFIX = "ERROR_REASON_"

#: Why requests fail, as clients read it.
REASONS: tuple[str, ...] = tuple(name.removeprefix(_PREFIX) for name, number in ErrorReason.items() if number)

OK = "ok"
#: The caller left before the end.
CANCELLED = "cancelled"


class Outcome:
    """The end of one request: *text* is `OK`, `CANCELLED`, a name of `REASONS`, or what a door knows beyond those."""

    __slots__ = ("text",)

    def __init__(self) -> None:
        self.text = OK

    def note(self, error: BaseException) -> None:
        """Note what the request ended with."""
        self.text = reason_of(error)


_current: ContextVar[Outcome | None] = ContextVar("outcome", default=None)


@contextmanager
def outcome_of_request() -> Iterator[Outcome]:
    """Yield the outcome of the request that is served in the block."""
    outcome = Outcome()
    token = _current.set(outcome)
    try:
        yield outcome
    except BaseException as error:
        outcome.note(error)
        raise
    finally:
        _current.reset(token)


def note_failure(error: BaseException) -> None:
    """Note what the present request ends with; without one there is nobody to tell."""
    outcome = _current.get()
    if outcome is not None:
        outcome.note(error)


def reason_of(error: BaseException) -> str:
    """Return the reason of a failure; INTERNAL for what nobody expected."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return CANCELLED
    if isinstance(error, LmdError) and error.reason in REASONS:
        return error.reason
    return "INTERNAL"
