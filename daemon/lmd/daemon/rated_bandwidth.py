"""How fast a device could read its memory, by its data sheet: for devices on which nothing was measured yet."""

from __future__ import annotations

import structlog

log = structlog.get_logger(__name__)

#: Memory moves data on both edges of the clock that the driver tells: 5120 bits at 2619 MHz are an H100's 3.35 TB/s.
_EDGES = 2


def rated_bandwidth(bus_id: str) -> int:
    """Return the bytes a second that the card at a PCI address is rated for; 0 when nobody tells. Blocks."""
    if not bus_id:
        return 0
    import pynvml

    try:
        # Counted by the library: where it is in use already, this costs nothing.
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
            width_bits = int(pynvml.nvmlDeviceGetMemoryBusWidth(handle))
            clock_mhz = int(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        log.debug("nvidia_bandwidth_unknown", bus_id=bus_id, error=str(error))
        return 0
    return width_bits // 8 * clock_mhz * 1_000_000 * _EDGES
