"""Durations in bodies of requests, as clients other than Ollama's write them."""

from __future__ import annotations

from datetime import timedelta

from lmd.daemon.quantities import FOR_EVER, parse_duration
from lmd.registry.errors import InvalidRequest


def duration_of(value: float | str | None, field: str) -> timedelta | None:
    """Return a duration: a number is seconds, a text has units; None when there is none.

    Raises:
        InvalidRequest: it is neither.
    """
    if value is None:
        return None
    if isinstance(value, str) and value.startswith("-") and value != "-1":
        # As Go writes them: "-1m".
        duration_of(value[1:], field)
        return FOR_EVER
    try:
        if isinstance(value, str):
            return parse_duration(value)
        return FOR_EVER if value < 0 else timedelta(seconds=value)
    except OverflowError:
        return FOR_EVER
    except ValueError as error:
        raise InvalidRequest(f"`{field}` is not legal: {error}", field=field) from None
