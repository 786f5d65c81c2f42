"""NVIDIA's cards, asked through its driver's management library. No driver, and no card, are ordinary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from lmd.daemon.devices.values import Card

log = structlog.get_logger(__name__)


class NvidiaCards:
    """Reads cards from the driver. *load* returns the bindings of its library."""

    def __init__(self, load: Callable[[], Any] | None = None) -> None:
        self._load = load or _pynvml
        #: Protects the first load and what was seen; the library itself is thread-safe after that.
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._tried = False
        self._fault = ""
        #: What each number was when it last answered: a lost card does not even tell its address.
        self._known: dict[int, Card] = {}

    def cards(self) -> Sequence[Card]:
        """Return all cards; one that the driver has lost is told with its fault."""
        with self._lock:
            nvml = self._loaded()
            if nvml is None:
                return [Card("nvidia", 0, "NVIDIA GPU", "", fault=self._fault)] if self._fault else []
            try:
                count = nvml.nvmlDeviceGetCount()
            except nvml.NVMLError as error:
                return [_lost(card, str(error)) for card in self._known.values()]
            return [self._card(nvml, number) for number in range(count)]

    def look_again(self) -> None:
        """Try a driver again that was not there."""
        with self._lock:
            if self._nvml is None:
                self._tried = False

    def _card(self, nvml: Any, number: int) -> Card:
        known = self._known.get(number, Card("nvidia", number, "NVIDIA GPU", ""))
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            name = _text(nvml.nvmlDeviceGetName(handle))
            bus_id = pci_address(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
        except nvml.NVMLError as error:
            return _lost(known, str(error))
        total_bytes: int | None = None
        free_bytes: int | None = None
        fault = ""
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            total_bytes, free_bytes = int(memory.total), int(memory.free)
        except nvml.NVMLError as error:
            # One whose memory is the machine's has none of its own to tell about.
            if getattr(error, "value", None) != nvml.NVML_ERROR_NOT_SUPPORTED:
                fault = str(error)
        card = Card("nvidia", number, name, bus_id, total_bytes, free_bytes, fault)
        if not fault:
            self._known[number] = card
        return card

    def _loaded(self) -> Any:
        if self._tried:
            return self._nvml
        self._tried = True
        self._fault = ""
        nvml = self._load()
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            absent = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
            if getattr(error, "value", None) in absent:
                log.debug("nvidia_driver_absent", error=str(error))
            else:
                self._fault = f"the NVIDIA driver does not answer: {error}"
                log.warning("nvidia_driver_unusable", error=str(error))
            return None
        self._nvml = nvml
        return nvml


def pci_address(text: str) -> str:
    """Return a PCI address as the kernel writes it: NVIDIA's has eight digits of domain, and capitals."""
    domain, _, rest = text.strip().lower().partition(":")
    return f"{domain[-4:].rjust(4, '0')}:{rest}" if rest else text.strip().lower()


def _lost(card: Card, why: str) -> Card:
    return Card(card.vendor, card.number, card.description, card.bus_id, card.total_bytes, 0, fault=why)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _pynvml() -> Any:
    import pynvml

    return pynvml
