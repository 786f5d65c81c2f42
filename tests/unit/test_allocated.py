from __future__ import annotations

import pytest

from lmd.runner.allocated import Buffer, by_device, count_copies_once, mapped_bytes, on_host
from lmd.runner.gpus import device_id


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("CPU", "cpu"),
        ("CPU_Mapped", "cpu"),
        ("CPU_REPACK", "cpu"),
        ("AMX", "cpu"),
        ("CUDA_Host", "cpu"),
        ("CUDA0", "cuda0"),
        ("CUDA1_Split", "cuda1"),
        ("Vulkan0", "vulkan0"),
        ("ROCm0", "rocm0"),
    ],
)
def test_where_a_buffer_is(name: str, device: str) -> None:
    assert device_id(name) == device
    assert on_host(name) is (device == "cpu")


def test_bytes_by_device_begin_with_main_memory() -> None:
    buffers: list[Buffer] = [
        ("CUDA0", "model", 100),
        ("CPU_Mapped", "model", 10),
        ("CUDA0", "KV", 20),
        ("CUDA0", "RS", 3),
        ("CUDA0", "compute", 5),
        ("CUDA_Host", "compute", 2),
        ("CUDA_Host", "output", 1),
    ]
    main, cuda = by_device(buffers)
    assert (main.device, main.weights_bytes, main.kv_bytes, main.compute_bytes) == ("cpu", 10, 0, 3)
    assert (cuda.device, cuda.weights_bytes, cuda.kv_bytes, cuda.compute_bytes) == ("cuda0", 100, 23, 5)
    assert mapped_bytes(buffers) == 10


def test_nothing_allocated_is_nothing_in_main_memory() -> None:
    (main,) = by_device([])
    assert (main.device, main.weights_bytes) == ("cpu", 0)


def test_weights_that_were_copied_out_of_a_mapping_count_once() -> None:
    """The engine rearranges 40 of 100 bytes and reports the whole mapping beside them."""
    buffers: list[Buffer] = [("CPU_Mapped", "model", 99), ("CPU_REPACK", "model", 40), ("CPU", "KV", 7)]
    count_copies_once(buffers, 0, 100)
    assert buffers == [("CPU_Mapped", "model", 60), ("CPU_REPACK", "model", 40), ("CPU", "KV", 7)]
    assert mapped_bytes(buffers) == 60


def test_a_copy_on_an_accelerator_is_no_copy_in_main_memory() -> None:
    """A tied head is on the accelerator and in main memory: both are there."""
    buffers: list[Buffer] = [("CPU_Mapped", "model", 30), ("CUDA0", "model", 100)]
    count_copies_once(buffers, 0, 100)
    assert buffers == [("CPU_Mapped", "model", 30), ("CUDA0", "model", 100)]


def test_only_the_mappings_of_one_file_are_looked_at() -> None:
    buffers: list[Buffer] = [
        ("CPU_Mapped", "model", 50),
        ("CPU_Mapped", "model", 99),
        ("CPU_REPACK", "model", 99),
    ]
    count_copies_once(buffers, 1, 100)
    assert buffers == [("CPU_Mapped", "model", 50), ("CPU_Mapped", "model", 1), ("CPU_REPACK", "model", 99)]
