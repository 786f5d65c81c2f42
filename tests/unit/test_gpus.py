"""From the daemon's words for devices to the engine's."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest

from lmd.runner.gpus import MAIN_MEMORY, DeviceGone, EngineDevice, Placement, device_id, engine_devices, place
from lmd.runner.native import load_bindings
from lmd.runner.v1.frames_pb2 import DevicePart, Load

A = EngineDevice("cuda0", "CUDA0", "cuda", "gpu", "NVIDIA L4", "0000:01:00.0", 24, 23, handle=0x10)
B = replace(A, id="cuda1", name="CUDA1", bus_id="0000:02:00.0", handle=0x20)
VULKAN = replace(A, id="vulkan0", name="Vulkan0", backend="vulkan", handle=0x30)
CPU = replace(A, id="cpu", name="CPU", backend="cpu", kind="cpu", bus_id="", handle=0x40)


@pytest.fixture(scope="module")
def llama() -> Any:
    bindings = load_bindings()
    bindings.llama_backend_init()
    return bindings


def load(*parts: DevicePart, num_gpu: int = -1) -> Load:
    return Load(num_gpu=num_gpu, devices=parts)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("CUDA0", "cuda0"),
        ("CUDA11", "cuda11"),
        ("ROCm1", "rocm1"),
        ("Vulkan0", "vulkan0"),
        ("SYCL2", "sycl2"),
        ("MTL0", "metal0"),
        ("MTL0_Mapped", "metal0"),
        ("Metal", "metal0"),
        ("GPUOpenCL", "gpuopencl0"),
        ("CPU", "cpu"),
        ("CPU_Mapped", "cpu"),
        ("CPU_REPACK", "cpu"),
        ("AMX", "cpu"),
        ("CUDA0_Split", "cuda0"),
        ("CUDA_Host", "cpu"),
        ("Vulkan_Host", "cpu"),
    ],
)
def test_devices_and_buffers_have_the_daemons_names(name: str, own: str) -> None:
    assert device_id(name) == own


def test_the_engine_here_offers_the_processor() -> None:
    load_bindings().llama_backend_init()
    [cpu] = [device for device in engine_devices() if device.kind == "cpu"]
    assert (cpu.id, cpu.accelerates) == ("cpu", False)
    assert cpu.total_bytes > 0
    assert cpu.handle > 0


def test_a_load_without_devices_or_layers_stays_in_main_memory() -> None:
    assert place(load(), [A, CPU]) == MAIN_MEMORY
    assert place(load(DevicePart(device="cuda0", part=1), num_gpu=0), [A, CPU]) == MAIN_MEMORY


def test_the_address_counts_when_the_engine_numbers_anew() -> None:
    moved = replace(B, id="cuda0", name="CUDA0")
    assert place(load(DevicePart(device="cuda1", part=1, bus_id=B.bus_id)), [moved]).devices == (moved,)


def test_the_same_card_through_another_backend_is_another_device() -> None:
    part = DevicePart(device="vulkan0", part=1, bus_id=A.bus_id)
    assert place(load(part), [A, VULKAN]).devices == (VULKAN,)


def test_without_an_address_the_name_counts() -> None:
    metal = replace(A, id="metal0", backend="metal", kind="igpu", bus_id="")
    assert place(load(DevicePart(device="metal0", part=1)), [metal]).devices == (metal,)
    assert place(load(DevicePart(device="cuda1", part=1)), [A, B]).devices == (B,)


def test_a_device_that_is_gone_is_named_with_what_is_left() -> None:
    gone = load(DevicePart(device="cuda1", part=1, bus_id=B.bus_id))
    with pytest.raises(DeviceGone) as caught:
        place(gone, [A, CPU])
    assert str(caught.value) == (
        "the engine does not find the device cuda1 at 0000:02:00.0; it finds cuda0 at 0000:01:00.0"
    )
    with pytest.raises(DeviceGone, match="it finds no accelerator"):
        place(gone, [CPU])


def test_another_card_with_the_number_of_the_one_that_is_gone_does_not_stand_in_for_it() -> None:
    other = replace(A, bus_id="0000:05:00.0")
    with pytest.raises(DeviceGone):
        place(load(DevicePart(device="cuda0", part=1, bus_id=A.bus_id)), [other])


def handles(params: Any) -> list[int | None]:
    array = ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))
    found: list[int | None] = []
    while (handle := array[len(found)]) is not None:
        found.append(handle)
    return found


def test_one_device_is_told_without_a_split(llama: Any) -> None:
    params = llama.llama_model_default_params()
    kept = Placement((B,), (1.0,)).fill(llama, params)
    assert handles(params) == [B.handle]
    assert (params.split_mode, params.main_gpu) == (llama.LLAMA_SPLIT_MODE_NONE, 0)
    assert kept


def test_several_devices_are_told_with_their_parts(llama: Any) -> None:
    params = llama.llama_model_default_params()
    kept = Placement((A, B), (3.0, 1.0)).fill(llama, params)
    assert handles(params) == [A.handle, B.handle]
    assert params.split_mode == llama.LLAMA_SPLIT_MODE_LAYER
    # The engine copies as many numbers as it has room for devices.
    assert [params.tensor_split[i] for i in range(llama.llama_max_devices())][:4] == [3.0, 1.0, 0.0, 0.0]
    assert kept


def test_main_memory_names_no_device_and_no_layers(llama: Any) -> None:
    params = llama.llama_model_default_params()
    params.n_gpu_layers = -1
    kept = MAIN_MEMORY.fill(llama, params)
    assert (handles(params), params.n_gpu_layers) == ([], 0)
    assert kept


def test_a_draft_goes_to_the_first_device() -> None:
    assert Placement((A, B), (3.0, 1.0)).first == Placement((A,), (3.0,))
    assert MAIN_MEMORY.first == MAIN_MEMORY
