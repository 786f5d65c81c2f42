"""Digests: the names of bytes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Self

from lmd.registry.errors import InvalidRequest

PREFIX = "sha256:"
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The SHA-256 of some bytes; its text is ``sha256:`` and 64 lower-case hex digits.

    Only well-formed values exist, so a digest is safe as a file name. Hashable and ordered by its hex digits.
    """

    hex: str

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.hex):
            raise InvalidRequest(
                f"{_shown(self.hex)} is not a SHA-256 in hex",
                field="digest",
                hint="a digest has 64 lower-case hex digits",
            )

    def __str__(self) -> str:
        return PREFIX + self.hex

    @property
    def short(self) -> str:
        """The first 12 hex digits, for people."""
        return self.hex[:12]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``sha256:<64 hex digits>``.

        Raises:
            InvalidRequest: for anything else, with field ``digest``.
        """
        if not text.startswith(PREFIX) or not _HEX.fullmatch(text, len(PREFIX)):
            raise InvalidRequest(
                f"{_shown(text)} is not a digest",
                field="digest",
                hint="a digest is `sha256:` and 64 lower-case hex digits",
            )
        return cls(text[len(PREFIX) :])

    @classmethod
    def from_hex(cls, text: str) -> Self:
        """Make a digest of 64 lower-case hex digits.

        Raises:
            InvalidRequest: for anything else, with field ``digest``.
        """
        return cls(text)

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Self:
        """Hash *data*."""
        return cls(hashlib.sha256(data).hexdigest())


def _shown(text: str) -> str:
    cut = text if len(text) <= 80 else text[:80] + "…"
    return f"`{cut.encode('unicode_escape').decode('ascii')}`" if not cut.isprintable() else f"`{cut}`"
