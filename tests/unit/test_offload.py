"""What a model may be loaded on, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from lmd.daemon.devices import Device
from lmd.daemon.errors import DeviceUnavailable
from lmd.daemon.residency.offload import Offload
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.residents import Threads

CPU = Device("cpu", "main memory", 64, 60)
GPU = Device("cuda0", "NVIDIA L4", 24, 23, backend="cuda", bus_id="0000:01:00.0")
SECOND = Device("cuda1", "NVIDIA L4", 24, 23, backend="cuda", bus_id="0000:02:00.0")
LOST = "cuda0 (NVIDIA L4) cannot be used: GPU is lost"


@dataclass
class Source:
    devices: Sequence[Device]
    why: str = ""
    lost: Mapping[str, str] = field(default_factory=dict)
    waited: int = 0

    async def known(self) -> None:
        self.waited += 1

    async def refresh(self) -> None:
        raise AssertionError("nobody asked for it")

    def usable(self) -> Sequence[Device]:
        assert self.waited, "nobody waited until it is known what there is"
        return self.devices

    def shortfall(self) -> str:
        return self.why

    def faults(self) -> Mapping[str, str]:
        return self.lost


def offload(*devices: Device, why: str = "", require_gpu: bool = False) -> Offload:
    return Offload(Source(devices, why), Threads(), require_gpu)


@pytest.mark.parametrize(
    ("devices", "num_gpu", "gpu_offload", "allowed"),
    [
        ((CPU, GPU, SECOND), -1, True, ("cuda0", "cuda1", "cpu")),
        ((CPU, GPU), 99, True, ("cuda0",)),
        ((CPU, GPU), 0, True, ("cpu",)),
        ((CPU, GPU), -1, False, ("cpu",)),
        ((CPU,), -1, True, ("cpu",)),
        ((CPU,), 99, True, ("cpu",)),
    ],
)
async def test_accelerators_come_first_and_main_memory_is_the_last_resort(
    devices: tuple[Device, ...], num_gpu: int, gpu_offload: bool, allowed: tuple[str, ...]
) -> None:
    assert await offload(*devices).allowed("m", num_gpu=num_gpu, gpu_offload=gpu_offload) == allowed


@pytest.mark.parametrize("num_gpu", [-1, 20])
async def test_a_required_accelerator_leaves_main_memory_out(num_gpu: int) -> None:
    required = offload(CPU, GPU, SECOND, require_gpu=True)
    assert await required.allowed("m", num_gpu=num_gpu, gpu_offload=True) == ("cuda0", "cuda1")
    with pytest.raises(DeviceUnavailable, match="the engine of its runner finds no accelerator"):
        await required.allowed("m", num_gpu=num_gpu, gpu_offload=False)
    with pytest.raises(DeviceUnavailable, match=r"GPU is lost; `runtime\.require_gpu` forbids main memory"):
        await offload(CPU, why=LOST, require_gpu=True).allowed("m", num_gpu=num_gpu, gpu_offload=True)
    with pytest.raises(DeviceUnavailable, match=r"the engine finds none; `runtime\.require_gpu` forbids main memory"):
        await offload(CPU, require_gpu=True).allowed("m", num_gpu=num_gpu, gpu_offload=False)


async def test_who_asks_for_main_memory_gets_it_also_then() -> None:
    assert await offload(CPU, GPU, require_gpu=True).allowed("m", num_gpu=0, gpu_offload=True) == ("cpu",)


async def test_a_runner_is_told_where_its_devices_are() -> None:
    parts = await offload(CPU, GPU, SECOND).parts({"cuda1": 3.0, "cuda0": 1.0, "cpu": 1.0, "metal0": 1.0})
    assert parts == [
        frames.DevicePart(device="cuda1", part=3.0, bus_id="0000:02:00.0"),
        frames.DevicePart(device="cuda0", part=1.0, bus_id="0000:01:00.0"),
        frames.DevicePart(device="metal0", part=1.0),
    ]


ON_GPU = frames.Ready(vram_bytes=5, gpu_layers=33)
IN_MEMORY = frames.Ready(vram_bytes=0, gpu_layers=0)


@pytest.mark.parametrize(
    ("placed", "ready", "num_gpu", "why", "remark"),
    [
        (["cuda0"], ON_GPU, -1, "", ""),
        (["cuda0"], ON_GPU, -1, LOST, ""),
        (["cuda0", "cuda1"], IN_MEMORY, -1, "", "in main memory: the engine put nothing on cuda0 and cuda1"),
        (["cpu"], IN_MEMORY, -1, LOST, f"in main memory: {LOST}"),
        (["cpu"], IN_MEMORY, 20, LOST, f"in main memory: {LOST}"),
        (["cpu"], IN_MEMORY, -1, "", ""),
        (["cpu"], IN_MEMORY, 0, LOST, ""),
    ],
)
async def test_a_fall_back_to_main_memory_is_said(
    placed: list[str], ready: frames.Ready, num_gpu: int, why: str, remark: str
) -> None:
    assert await offload(CPU, GPU, why=why).remark("m", placed, ready, num_gpu=num_gpu, gpu_offload=True) == remark


async def test_a_runner_whose_engine_finds_less_than_the_probe_is_said() -> None:
    remark = await offload(CPU, GPU).remark("m", ["cpu"], IN_MEMORY, num_gpu=-1, gpu_offload=False)
    assert remark == "in main memory: the engine of its runner finds no accelerator"
    assert await offload(CPU).remark("m", ["cpu"], IN_MEMORY, num_gpu=-1, gpu_offload=False) == ""


async def test_a_fall_back_of_the_engine_is_an_error_when_an_accelerator_is_required() -> None:
    with pytest.raises(DeviceUnavailable, match="the engine put nothing on cuda0"):
        await offload(CPU, GPU, require_gpu=True).remark("m", ["cuda0"], IN_MEMORY, num_gpu=-1, gpu_offload=True)


def test_lost_devices_are_named() -> None:
    source = Source((CPU,), lost={"cuda0": "GPU is lost"})
    assert Offload(source, Threads()).fault_of(["cuda1", "cuda0"]) == "cuda0 is lost: GPU is lost"
    assert Offload(source, Threads()).fault_of(["cuda1", "cpu"]) == ""
