"""What llama.cpp says while it works: warnings go to stderr, errors are kept, buffer sizes are read."""

from __future__ import annotations

import collections
import contextlib
import os
import re
from collections.abc import Callable
from typing import Any

# enum ggml_log_level
_INFO, _WARN, _ERROR, _CONTINUED = 2, 3, 4, 5

_KEPT_ERRORS = 4
# A warning about the context being longer than the model's: it is shared by all slots, each of which keeps to its part.
_SHARED_CONTEXT = b"possible training context overflow"
_BUFFER = re.compile(rb"(\S+)\s+(model|LoRA|KV|RS|compute|output)(?: state)? buffer size\s*=\s*([0-9.]+) MiB")
_OFFLOADED = re.compile(rb"offloaded (\d+)/\d+ layers to GPU")
_OUT_OF_MEMORY = re.compile(rb"out of memory|unable to allocate|failed to allocate|bad_alloc|cannot allocate", re.I)


# The engine has one log for the process and calls it until the end, whoever set it; ctypes frees a callback with its
# last reference. So the one in use is kept here.
_installed: list[Any] = []


def install_log(llama: Any, receive: Callable[[int, bytes, object], None]) -> None:
    """Have every log line of llama.cpp in this process given to *receive*: level, text, and a value without meaning."""
    callback = llama.llama_log_callback(receive)
    llama.llama_log_set(callback, None)
    _installed[:] = [callback]


class EngineLog:
    """Receives every log line of llama.cpp in this process.

    The engine may call from any of its threads; the interpreter lock is what keeps the fields consistent.

    Attributes:
        buffers: (buffer name such as `CPU_Mapped` or `CUDA0`, kind, bytes) in the order allocated. llama.cpp has no
            call that returns them; it prints them in MiB with two decimals. An adapter's are of the kind "model".
        settled: whether buffers are no longer of interest: the engine prints those of a context whenever it plans anew.
        gpu_layers: how many layers it put on accelerators.
        out_of_memory: whether an error said so.
    """

    def __init__(self, llama: Any) -> None:
        self.buffers: list[tuple[str, str, int]] = []
        self.settled = False
        self.gpu_layers = 0
        self.out_of_memory = False
        self._errors: collections.deque[str] = collections.deque(maxlen=_KEPT_ERRORS)
        self._level = _INFO
        install_log(llama, self._receive)

    def errors(self) -> str:
        """Return the last error lines in one, without their function names."""
        return "; ".join(dict.fromkeys(self._errors))

    def drop_replaced(self, begin: int) -> None:
        """Of the compute buffers that one context reported, from the place *begin* on, keep the latest of each name."""
        latest = {name: place for place, (name, kind, _) in enumerate(self.buffers) if kind == "compute"}
        self.buffers[begin:] = [
            buffer
            for place, buffer in enumerate(self.buffers[begin:], begin)
            if buffer[1] != "compute" or latest[buffer[0]] == place
        ]

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        level = self._level if level == _CONTINUED else level
        self._level = level
        if level < _INFO:
            return
        if level == _INFO:
            if b"buffer size" in text and not self.settled:
                self._read_buffer(text)
            elif match := _OFFLOADED.search(text):
                self.gpu_layers = int(match[1])
            return
        if _SHARED_CONTEXT in text:
            return
        with contextlib.suppress(OSError):
            os.write(2, text)
        if level >= _ERROR:
            line = text.decode(errors="replace").strip()
            self.out_of_memory |= _OUT_OF_MEMORY.search(text) is not None
            if line:
                self._errors.append(line.split(": ", 1)[-1])

    def _read_buffer(self, text: bytes) -> None:
        if match := _BUFFER.search(text):
            size_bytes = round(float(match[3]) * (1 << 20))
            kind = "model" if match[2] == b"LoRA" else match[2].decode()
            self.buffers.append((match[1].decode(), kind, size_bytes))
