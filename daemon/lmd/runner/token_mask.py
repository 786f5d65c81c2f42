"""Applies masks of tokens to logits."""

from __future__ import annotations

import ctypes

import numpy


def forbid(allowed: bytes, logits_address: int, count: int) -> None:
    """Set the logits of tokens whose bit in *allowed* (lowest first) is not set to negative infinity.

    *logits_address* is where *count* float32 values lie, one for each token.
    """
    if count > len(allowed) * 8:
        raise ValueError(f"{count} logits, but the mask has {len(allowed) * 8} tokens")
    bits = numpy.frombuffer(allowed, dtype=numpy.uint8)
    forbidden = numpy.unpackbits(~bits, count=count, bitorder="little").view(numpy.bool_)
    logits = numpy.ctypeslib.as_array((ctypes.c_float * count).from_address(logits_address))
    numpy.copyto(logits, -numpy.inf, where=forbidden)
