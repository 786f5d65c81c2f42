"""What errors say to people, and what they carry for programs."""

from __future__ import annotations

import pytest

from lmd.daemon.errors import DeviceMemoryShort
from lmd.registry.errors import DiskFull, size_text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (23_275_904, "22.2 MiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_sizes_are_for_people(size_bytes: int, text: str) -> None:
    assert size_text(size_bytes) == text


def test_exact_bytes_are_for_programs() -> None:
    full = DiskFull(needed_bytes=23_275_904, free_bytes=6_744_310, where="/store")
    assert full.message == "not enough disk space in /store: 22.2 MiB needed, 6.4 MiB free"
    assert full.metadata == {"needed_bytes": "23275904", "free_bytes": "6744310"}
    short = DeviceMemoryShort("m:latest", needed_bytes=8 << 30, free_bytes=2 << 30, device="cpu")
    assert "8.0 GiB needed, 2.0 GiB can be freed" in short.message
    assert short.metadata["needed_bytes"] == str(8 << 30)
