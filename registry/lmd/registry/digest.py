"""Digests: the names of bytes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from lmd.registry.errors import InvalidRequest

HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A SHA-256 digest; *hex* is 64 lower-case hex digits."""

    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read the form ``sha256:<64 hex digits>``.

        Raises: InvalidRequest.
        """
        algorithm, separator, digits = text.partition(":")
        if algorithm != "sha256" or not separator:
            raise InvalidRequest(f"digest `{text[:80]}` does not start with `sha256:`", field="digest")
        return cls.from_hex(digits)

    @classmethod
    def from_hex(cls, digits: str) -> Digest:
        """Read 64 lower-case hex digits.

        Raises: InvalidRequest.
        """
        if not HEX.fullmatch(digits):
            raise InvalidRequest(f"digest `{digits[:80]}` is not 64 lower-case hex digits", field="digest")
        return cls(digits)

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Digest:
        """Hash *data*."""
        return cls(hashlib.sha256(data).hexdigest())

    def __str__(self) -> str:
        return f"sha256:{self.hex}"
