"""How fast a device could read its memory, by its data sheet: for devices on which nothing was measured yet."""

from __future__ import annotations

import re

import structlog

log = structlog.get_logger(__name__)

_CUDA = re.compile(r"cuda(\d{1,4})")
#: Memory moves data on both edges of the clock that the driver tells: 5120 bits at 2619 MHz are an H100's 3.35 TB/s.
_EDGES = 2


def rated_bandwidth(device: str) -> int:
    """Return the bytes a second that *device* is rated for; 0 when that is not known, as of main memory. Blocks."""
    match = _CUDA.fullmatch(device)
    return _nvidia(int(match[1])) if match is not None else 0


def _nvidia(number: int) -> int:
    import pynvml

    try:
        # Counted by the library: where it is in use already, this costs nothing.
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            width_bits = int(pynvml.nvmlDeviceGetMemoryBusWidth(handle))
            clock_mhz = int(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        log.debug("nvidia_bandwidth_unknown", device=f"cuda{number}", error=str(error))
        return 0
    return width_bits // 8 * clock_mhz * 1_000_000 * _EDGES
