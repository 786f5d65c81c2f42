"""Writes floating point numbers as Go does: the fewest digits that say which one it is."""

from __future__ import annotations

import math


def float_text(value: float, *, large: int = 6, small: int = -4, pad: int = 2) -> str:
    """Return the shortest text of a number, with an exponent from 10^*large* on and below 10^*small*.

    *pad* is how many digits an exponent has at least.
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    sign = "-" if math.copysign(1, value) < 0 else ""
    digits, exponent = _shortest(abs(value))
    if value and (exponent < small or exponent >= large):
        mantissa = digits[0] + ("." + digits[1:] if len(digits) > 1 else "")
        return f"{sign}{mantissa}e{'-' if exponent < 0 else '+'}{abs(exponent):0{pad}d}"
    if exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{digits}"
    whole = digits[: exponent + 1].ljust(exponent + 1, "0")
    rest = digits[exponent + 1 :]
    return f"{sign}{whole}.{rest}" if rest else f"{sign}{whole}"


def _shortest(value: float) -> tuple[str, int]:
    """Return the digits that tell a number from its neighbours, and the power of ten of the first."""
    mantissa, _, exponent = f"{value!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = whole + fraction
    power = int(exponent or 0) + len(whole) - 1
    stripped = digits.lstrip("0")
    power -= len(digits) - len(stripped)
    return (stripped.rstrip("0"), power) if stripped else ("0", 0)
