"""Sizes, counts, durations and times, as people read and type them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SIZE_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_COUNT_UNITS = ("K", "M", "B", "T")
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?(?:([kmgtp])(i?b)?|b)", re.IGNORECASE)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DAY_S = 86400
_CALENDAR = (
    *((1, "second"), (60, "minute"), (3600, "hour"), (_DAY_S, "day")),
    *((7 * _DAY_S, "week"), (30 * _DAY_S, "month"), (365 * _DAY_S, "year")),
)

FOR_EVER = "for ever"


def format_size(size_bytes: float) -> str:
    """Return a size in binary units with three significant digits at most: "1.18 MiB", "45.2 GiB"."""
    if size_bytes < 1024:
        return f"{int(size_bytes)} B"
    value, unit = _scaled(size_bytes, 1024, _SIZE_UNITS)
    return f"{_three_digits(value)} {unit}"


def format_count(count: int) -> str:
    """Return a number of weights as model names give it: "260K", "8.03B"."""
    if count < 1000:
        return str(count)
    value, unit = _scaled(count, 1000, _COUNT_UNITS)
    return f"{_three_digits(value)}{unit}"


def _scaled(value: float, base: int, units: Sequence[str]) -> tuple[float, str]:
    """Return *value* in the first unit that keeps it below a thousand, or in the last one."""
    power = 1
    while value / base**power >= 999.5 and power < len(units):
        power += 1
    return value / base**power, units[power - 1]


def _three_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text


def format_elapsed(seconds: float) -> str:
    """Return how long something took: "340ms", "2.5s", "3m 20s", "2h 5m"."""
    if seconds < 1:
        return f"{max(seconds, 0.0) * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s"
    return f"{whole // 3600}h {whole % 3600 // 60}m"


def format_clock(seconds: float) -> str:
    """Return a remaining time in a fixed shape for progress bars: "0:09", "12:34", "1:02:03"."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
    return f"{whole // 60}:{whole % 60:02}"


def format_span(seconds: float) -> str:
    """Return a span in its largest unit, rounded to the nearest: "5 seconds", "2 minutes", "3 weeks"."""
    elapsed_s, rounded_s, text = max(seconds, 0.0), 0, ""
    for unit_s, unit in _CALENDAR:
        # Rounding may fill a unit too: 59.5 minutes are an hour, not 60 minutes.
        if text and max(elapsed_s, rounded_s) < unit_s:
            break
        number = int(elapsed_s / unit_s + 0.5)
        rounded_s, text = number * unit_s, _counted(number, unit)
    return text


def format_ago(seconds: float) -> str:
    """Return a time in the past: "just now", "2 minutes ago"."""
    return "just now" if seconds < 5 else f"{format_span(seconds)} ago"


def format_until(seconds: float) -> str:
    """Return a time to come: "now", "4 minutes from now"."""
    return "now" if seconds < 0.5 else f"{format_span(seconds)} from now"


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def parse_duration(text: str) -> float:
    """Return the seconds of "90", "5m", "1h30m" or "-1"; negative means for ever.

    Raises:
        ValueError: it is none of these.
    """
    stripped = text.strip().lower()
    sign = 1.0
    if stripped.startswith("-"):
        sign, stripped = -1.0, stripped[1:]
    if re.fullmatch(r"\d+(\.\d+)?", stripped):
        return sign * float(stripped)
    parts = _DURATION_PART.findall(stripped)
    if not parts or "".join(number + unit for number, unit in parts) != stripped:
        raise ValueError(text)
    return sign * sum(float(number) * _DURATION_SECONDS[unit] for number, unit in parts)


def parse_size(text: str) -> int:
    """Return the bytes of "8GiB", "8G" (the same), "8GB" (powers of 1000) or "100B".

    Raises:
        ValueError: it is none of these; a number alone is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, letter, tail = match.groups()
    base = 1000 if (tail or "").lower() == "b" else 1024
    factor: int = base ** ("kmgtp".index(letter.lower()) + 1) if letter else 1
    return int(float(number) * factor) if "." in number else int(number) * factor
