"""The devices that the engine's backends offer, and which of them a model is loaded on.

The daemon knows a device by an id, such as "cuda0", and by its PCI address where it has one. The engine numbers what it
finds anew in every process, so when a device is gone the others change their numbers; the address is what counts.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmd.runner.v1 import frames_pb2

# enum ggml_backend_dev_type
_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel", 4: "meta"}
_ACCELERATORS = ("gpu", "igpu")

# What the engine calls its backends, where we use another word.
_WORDS = {"mtl": "metal", "hip": "rocm"}


class DeviceGone(Exception):
    """Raised when the engine does not offer a device that a model should be loaded on; the message says which."""


class _Capabilities(ctypes.Structure):
    """`struct ggml_backend_dev_caps`."""

    _fields_ = [
        ("asynchronous", ctypes.c_bool),
        ("host_buffer", ctypes.c_bool),
        ("buffer_from_host_ptr", ctypes.c_bool),
        ("events", ctypes.c_bool),
        ("mmap_support", ctypes.c_bool),
    ]


class _Properties(ctypes.Structure):
    """`struct ggml_backend_dev_props`, with room behind it: one that grew must not write over what is not ours."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", _Capabilities),
        ("room", ctypes.c_char * 256),
    ]


@dataclass(frozen=True, slots=True)
class EngineDevice:
    """A device as a backend of the engine shows it.

    Attributes:
        id: what the daemon calls it: "cpu", or the backend's word with a number.
        name: what the engine calls it; its buffers bear that name, too.
        backend: "cpu", "cuda", "rocm", "sycl", "vulkan", "metal", …
        kind: "cpu", "gpu", "igpu" (its memory is the machine's), "accel" (computes beside the CPU) or "meta".
        description: what it is, for people.
        bus_id: its PCI address, such as "0000:c1:00.0"; "" when the backend does not tell.
        handle: the engine's own reference; good for the life of the process.
    """

    id: str
    name: str
    backend: str
    kind: str
    description: str
    bus_id: str
    total_bytes: int
    free_bytes: int
    handle: int

    @property
    def accelerates(self) -> bool:
        """Whether layers can be put on it."""
        return self.kind in _ACCELERATORS and self.backend != "rpc"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the layers on accelerators go: the devices in order, and how much of the layers each gets.

    No devices: the model is in main memory alone, and the engine touches no accelerator for it.
    """

    devices: tuple[EngineDevice, ...] = ()
    parts: tuple[float, ...] = ()

    @property
    def first(self) -> Placement:
        """What is not worth splitting goes to the first device."""
        return Placement(self.devices[:1], self.parts[:1])

    def fill(self, llama: Any, params: Any) -> list[Any]:
        """Set the fields of `llama_model_params`; return what has to live until the model is loaded."""
        handles = (ctypes.c_void_p * (len(self.devices) + 1))(*(device.handle for device in self.devices), None)
        params.devices = ctypes.cast(handles, ctypes.c_void_p)
        kept: list[Any] = [handles]
        if len(self.devices) > 1:
            parts = (ctypes.c_float * int(llama.llama_max_devices()))(*self.parts)
            params.split_mode = llama.LLAMA_SPLIT_MODE_LAYER
            params.tensor_split = ctypes.cast(parts, ctypes.POINTER(ctypes.c_float))
            kept.append(parts)
        elif self.devices:
            params.split_mode = llama.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = 0  # of the list above
        else:
            params.n_gpu_layers = 0
        return kept


MAIN_MEMORY = Placement()


def engine_devices() -> list[EngineDevice]:
    """Return what the engine's backends offer, in the engine's order. `llama_backend_init` must have been called.

    Asks each accelerator for its memory, which may start its driver: tenths of a second.
    """
    ggml = _library()
    found = []
    for index in range(ggml.ggml_backend_dev_count()):
        handle = ggml.ggml_backend_dev_get(index)
        props = _Properties()
        ggml.ggml_backend_dev_get_props(handle, ctypes.byref(props))
        name = _text(props.name)
        own_id = device_id(name)
        found.append(
            EngineDevice(
                id=own_id,
                name=name,
                backend=own_id.rstrip("0123456789"),
                kind=_KINDS.get(props.type, "unknown"),
                description=_text(props.description).strip() or name,
                bus_id=_text(props.device_id).lower(),
                total_bytes=int(props.memory_total),
                free_bytes=int(props.memory_free),
                handle=int(handle),
            )
        )
    return found


def device_id(name: str) -> str:
    """Return what the daemon calls a device, or the owner of a buffer, that the engine calls *name*.

    "CUDA0" and its "CUDA0_Split" are "cuda0", "MTL0" and "Metal" are "metal0"; what starts with "CPU", "AMX", and the
    host buffers of accelerators such as "CUDA_Host", are in main memory: "cpu".
    """
    if name.startswith("CPU") or name == "AMX" or name.endswith("_Host"):
        return "cpu"
    match = re.match(r"([A-Za-z]+)[^0-9]*([0-9]*)", name)
    if match is None:
        return name.lower()
    word = match[1].lower()
    return f"{_WORDS.get(word, word)}{match[2] or '0'}"


def place(load: frames_pb2.Load, offered: Sequence[EngineDevice]) -> Placement:
    """Return where *load* puts its layers.

    Raises:
        DeviceGone: the engine does not offer one of its devices.
    """
    if load.num_gpu == 0:
        return MAIN_MEMORY
    chosen = tuple(_find(part, offered) for part in load.devices)
    # Parts that were left out are equal ones.
    return Placement(chosen, tuple(part.part or 1.0 for part in load.devices))


def _find(part: frames_pb2.DevicePart, offered: Sequence[EngineDevice]) -> EngineDevice:
    accelerators = [device for device in offered if device.accelerates]
    backend = part.device.rstrip("0123456789")
    for device in accelerators:
        if part.bus_id and device.bus_id:
            if device.bus_id == part.bus_id and device.backend == backend:
                return device
        elif device.id == part.device:
            return device
    where = f"{part.device} at {part.bus_id}" if part.bus_id else part.device
    there = ", ".join(f"{device.id} at {device.bus_id}" if device.bus_id else device.id for device in accelerators)
    raise DeviceGone(f"the engine does not find the device {where}; it finds {there or 'no accelerator'}")


def _library() -> Any:
    """Return ggml, with what is called here declared. The bindings must have been loaded (see `native`)."""
    ggml = importlib.import_module("llama_cpp._ggml").libggml
    ggml.ggml_backend_dev_count.argtypes = []
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get_props.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    ggml.ggml_backend_dev_get_props.restype = None
    return ggml


def _text(value: bytes | None) -> str:
    return value.decode(errors="replace") if value else ""
