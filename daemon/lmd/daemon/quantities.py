"""Durations and sizes as people write them: `5m`, `1h30m`, `-1`; `512MiB`, `2GB`.

A number without a unit is refused, because a reader cannot tell seconds from minutes or bytes from blocks; only `0`
(nothing) and `-1` (a duration without end) stand alone.
"""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal

#: A duration without end; any negative duration means the same.
FOR_EVER = timedelta(seconds=-1)

DURATION_FORM = 'a duration such as "30s", "5m" or "1h30m"'
SIZE_FORM = 'a size such as "512MiB" or "2GB"'

_MICROSECONDS = {"d": 86_400_000_000, "h": 3_600_000_000, "m": 60_000_000, "s": 1_000_000, "ms": 1_000, "us": 1}
_BYTES = {
    "TiB": 1 << 40,
    "GiB": 1 << 30,
    "MiB": 1 << 20,
    "KiB": 1 << 10,
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "KB": 10**3,
    "B": 1,
}
_BYTES_BY_LOWER = {unit.lower(): factor for unit, factor in _BYTES.items()}

_DURATION_PART = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(ms|us|d|h|m|s)")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([kmgt]i?b|b)", re.IGNORECASE)


def parse_duration(text: str) -> timedelta:
    """Read a duration: units d, h, m, s, ms, us, largest first, each at most once; `-1` lasts for ever.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    text = text.strip()
    if text == "-1":
        return FOR_EVER
    if text == "0":
        return timedelta()
    position = 0
    smallest = max(_MICROSECONDS.values()) + 1
    total = Decimal(0)
    while match := _DURATION_PART.match(text, position):
        unit = _MICROSECONDS[match[2]]
        if unit >= smallest:
            raise ValueError(f"{text!r} repeats a unit, or does not go from large to small")
        smallest = unit
        total += Decimal(match[1]) * unit
        position = match.end()
    if position == 0 or position != len(text):
        if re.fullmatch(r"[0-9.]+", text):
            raise ValueError(f"{text!r} has no unit; write {text}s for seconds or {text}m for minutes")
        raise ValueError(f"{text!r} is not {DURATION_FORM}")
    try:
        return timedelta(microseconds=int(total))
    except OverflowError:
        raise ValueError(f"{text!r} is too long") from None


def format_duration(duration: timedelta) -> str:
    """Write *duration* so that `parse_duration` gives it back; every negative one is `-1`."""
    if duration < timedelta():
        return "-1"
    rest = duration // timedelta(microseconds=1)
    parts = []
    for unit, factor in _MICROSECONDS.items():
        count, rest = divmod(rest, factor)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0"


def parse_size(text: str) -> int:
    """Read a number of bytes: KiB, MiB, GiB, TiB are powers of 1024, KB, MB, GB, TB powers of 1000.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    text = text.strip()
    if text == "0":
        return 0
    match = _SIZE.fullmatch(text)
    if match is None:
        if re.fullmatch(r"[0-9.]+", text):
            raise ValueError(f"{text!r} has no unit; write {text}B or {text}MiB")
        raise ValueError(f"{text!r} is not {SIZE_FORM}")
    return int(Decimal(match[1]) * _BYTES_BY_LOWER[match[2].lower()])


def format_size(size_bytes: int) -> str:
    """Write *size_bytes* exactly, in the largest binary unit that divides it."""
    if size_bytes == 0:
        return "0"
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes % _BYTES[unit] == 0:
            return f"{size_bytes // _BYTES[unit]}{unit}"
    return f"{size_bytes}B"
