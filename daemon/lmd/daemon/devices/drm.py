"""AMD's and Intel's cards, as the kernel shows them under /sys/class/drm.

Source: Linux Documentation/gpu/amdgpu/driver-misc.rst ("GPU Memory Usage Information") and the attributes that i915 and
xe make: amdgpu tells total and used bytes (`device/mem_info_vram_*`), i915 total and available ones of cards with
memory of their own (`lmem_*_bytes`), xe the total of each tile (`device/tile*/…/physical_vram_size_bytes`) and no use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmd.daemon.devices.values import Card

_VENDORS = {"0x1002": "amd", "0x8086": "intel"}
_NAMES = {"amd": "AMD GPU", "intel": "Intel GPU"}


class DrmCards:
    """Reads cards from the kernel's files below *root*."""

    def __init__(self, root: Path = Path("/sys/class/drm")) -> None:
        self._root = root

    def cards(self) -> Sequence[Card]:
        """Return the cards of the vendors that are known here, in the kernel's order."""
        found: list[Card] = []
        for place in sorted(self._root.glob("card[0-9]*"), key=_number):
            # Beside the cards lie their connectors, such as "card0-DP-1".
            vendor = _VENDORS.get(_line(place / "device" / "vendor"))
            if "-" in place.name or vendor is None:
                continue
            number = sum(card.vendor == vendor for card in found)
            found.append(_card(place, vendor, number))
        return found

    def look_again(self) -> None:
        """Do nothing: the files are read anew each time."""


def _card(place: Path, vendor: str, number: int) -> Card:
    device = place / "device"
    facts = dict(line.split("=", 1) for line in _lines(device / "uevent") if "=" in line)
    name = _line(device / "product_name") or f"{_NAMES[vendor]} {facts.get('PCI_ID', '').lower()}".strip()
    total_bytes, free_bytes = _amd_memory(device) if vendor == "amd" else _intel_memory(place)
    return Card(vendor, number, name, facts.get("PCI_SLOT_NAME", "").lower(), total_bytes, free_bytes)


def _amd_memory(device: Path) -> tuple[int | None, int | None]:
    total, used = _bytes(device / "mem_info_vram_total"), _bytes(device / "mem_info_vram_used")
    return total, max(total - used, 0) if total is not None and used is not None else None


def _intel_memory(place: Path) -> tuple[int | None, int | None]:
    for directory in (place, place / "device"):
        total = _bytes(directory / "lmem_total_bytes")
        if total:
            return total, _bytes(directory / "lmem_avail_bytes")
    tiles = [
        size
        for pattern in ("tile*/physical_vram_size_bytes", "tile*/memory/physical_vram_size_bytes")
        for file in (place / "device").glob(pattern)
        if (size := _bytes(file)) is not None
    ]
    return sum(tiles) or None, None


def _number(place: Path) -> tuple[int, str]:
    digits = place.name.removeprefix("card").split("-")[0]
    return int(digits) if digits.isdecimal() else 0, place.name


def _bytes(file: Path) -> int | None:
    text = _line(file)
    return int(text) if text.isdecimal() else None


def _line(file: Path) -> str:
    return next(iter(_lines(file)), "").strip()


def _lines(file: Path) -> list[str]:
    """Return the lines of a file; none when the kernel has no such file, or the device went away under it."""
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []
