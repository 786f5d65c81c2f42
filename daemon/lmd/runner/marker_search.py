"""Looks for markers in text that comes in pieces."""

from __future__ import annotations


def held_from(text: str, at: int, marker: str) -> int:
    """Return where text after *at* may be the beginning of a marker that goes on later; its length where none is."""
    for size in range(min(len(marker) - 1, len(text) - at), 0, -1):
        if text.endswith(marker[:size]):
            return len(text) - size
    return len(text)
