"""Futures that may be settled by more than one event, or that nobody waits for any more."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


def resolve(future: asyncio.Future[T], value: T) -> None:
    """Set the result, unless the future is done."""
    if not future.done():
        future.set_result(value)


def fail(future: asyncio.Future[T], error: Exception) -> None:
    """Set the error, unless the future is done."""
    if not future.done():
        future.set_exception(error)
        future.exception()  # mark as seen: it is fine when nobody waits for it
