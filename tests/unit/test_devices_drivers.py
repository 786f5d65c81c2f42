"""What drivers and the kernel say of cards: a fake NVML, and trees as amdgpu, i915 and xe make them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from lmd.daemon.devices.drm import DrmCards
from lmd.daemon.devices.nvidia import NvidiaCards, pci_address
from lmd.daemon.devices.values import Card

GIB = 1 << 30


class FakeNvml(types.SimpleNamespace):
    """Stands in for the driver's library, which a test machine need not have."""

    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__({15: "GPU is lost", 18: "Driver/library version mismatch"}.get(value, f"error {value}"))
            self.value = value

    def __init__(self, gpus: list[tuple[str, int, int]], init_error: int | None = None) -> None:
        super().__init__()
        self.gpus = gpus
        self.init_error = init_error
        self.lost: set[int] = set()
        self.memoryless: set[int] = set()
        self.inits = 0

    def nvmlInit(self) -> None:
        self.inits += 1
        if self.init_error is not None:
            raise self.NVMLError(self.init_error)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        if number in self.lost:
            raise self.NVMLError(self.NVML_ERROR_GPU_IS_LOST)
        return number

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.gpus[handle][0]

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(busId=f"0000000A:0{handle + 1}:00.0".encode())

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if handle in self.memoryless:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return types.SimpleNamespace(total=self.gpus[handle][1], free=self.gpus[handle][2])


def test_nvidia_cards_have_names_memory_and_addresses() -> None:
    nvml = FakeNvml([("NVIDIA H200", 141, 140), ("NVIDIA L4", 24, 3)])
    assert NvidiaCards(lambda: nvml).cards() == [
        Card("nvidia", 0, "NVIDIA H200", "000a:01:00.0", 141, 140),
        Card("nvidia", 1, "NVIDIA L4", "000a:02:00.0", 24, 3),
    ]


def test_a_card_whose_memory_is_the_machines_has_none_of_its_own() -> None:
    nvml = FakeNvml([("NVIDIA GB10", 0, 0)])
    nvml.memoryless = {0}
    assert NvidiaCards(lambda: nvml).cards() == [Card("nvidia", 0, "NVIDIA GB10", "000a:01:00.0")]


def test_a_lost_card_is_told_as_what_it_was_and_hides_no_other() -> None:
    nvml = FakeNvml([("NVIDIA H200", 141, 140), ("NVIDIA L4", 24, 3)])
    reader = NvidiaCards(lambda: nvml)
    reader.cards()
    nvml.lost = {0}
    assert reader.cards() == [
        Card("nvidia", 0, "NVIDIA H200", "000a:01:00.0", 141, 0, fault="GPU is lost"),
        Card("nvidia", 1, "NVIDIA L4", "000a:02:00.0", 24, 3),
    ]
    nvml.lost = set()
    assert reader.cards()[0].fault == ""


@pytest.mark.parametrize("absent", [FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND, FakeNvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_no_driver_is_no_fault_and_is_not_asked_for_again_and_again(absent: int) -> None:
    nvml = FakeNvml([("NVIDIA L4", 24, 3)], init_error=absent)
    reader = NvidiaCards(lambda: nvml)
    assert (reader.cards(), reader.cards(), nvml.inits) == ([], [], 1)
    nvml.init_error = None
    reader.look_again()
    assert [card.description for card in reader.cards()] == ["NVIDIA L4"]


def test_a_driver_that_does_not_fit_its_library_is_a_fault() -> None:
    reader = NvidiaCards(lambda: FakeNvml([], init_error=FakeNvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    [card] = reader.cards()
    assert card.fault == "the NVIDIA driver does not answer: Driver/library version mismatch"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("00000000:C1:00.0", "0000:c1:00.0"),
        ("0000:c1:00.0", "0000:c1:00.0"),
        ("00010000:01:00.0", "0000:01:00.0"),
        ("1:0b:00.0", "0001:0b:00.0"),
        ("", ""),
    ],
)
def test_pci_addresses_are_written_as_the_kernel_does(text: str, address: str) -> None:
    assert pci_address(text) == address


def tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


def uevent(driver: str, pci_id: str, slot: str) -> str:
    return f"DRIVER={driver}\nPCI_CLASS=30000\nPCI_ID={pci_id}\nPCI_SLOT_NAME={slot}"


def test_amdgpu_tells_total_and_used(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "card1/device/vendor": "0x1002",
            "card1/device/uevent": uevent("amdgpu", "1002:744C", "0000:03:00.0"),
            "card1/device/product_name": "Radeon RX 7900 XTX",
            "card1/device/mem_info_vram_total": str(24 * GIB),
            "card1/device/mem_info_vram_used": str(2 * GIB),
            "card1-DP-1/status": "connected",
            "card1-DP-1/device/vendor": "0x1002",
            "renderD128/device/vendor": "0x1002",
            "version": "drm 1.1.0 20060810",
        },
    )
    assert DrmCards(tmp_path).cards() == [Card("amd", 0, "Radeon RX 7900 XTX", "0000:03:00.0", 24 * GIB, 22 * GIB)]


def test_cards_are_numbered_by_vendor_in_the_kernels_order(tmp_path: Path) -> None:
    for number, vendor in (("10", "0x1002"), ("2", "0x1002"), ("0", "0x8086"), ("1", "0x10de")):
        tree(
            tmp_path,
            {
                f"card{number}/device/vendor": vendor,
                f"card{number}/device/uevent": uevent("x", "1002:0001", f"0000:{int(number):02x}:00.0"),
            },
        )
    found = [(card.vendor, card.number, card.bus_id) for card in DrmCards(tmp_path).cards()]
    # NVIDIA's are left to its own library.
    assert found == [("intel", 0, "0000:00:00.0"), ("amd", 0, "0000:02:00.0"), ("amd", 1, "0000:0a:00.0")]


def test_i915_tells_total_and_available_of_cards_with_memory_of_their_own(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "card0/device/vendor": "0x8086",
            "card0/device/uevent": uevent("i915", "8086:56A0", "0000:03:00.0"),
            "card0/lmem_total_bytes": str(16 * GIB),
            "card0/lmem_avail_bytes": str(15 * GIB),
        },
    )
    assert DrmCards(tmp_path).cards() == [Card("intel", 0, "Intel GPU 8086:56a0", "0000:03:00.0", 16 * GIB, 15 * GIB)]


@pytest.mark.parametrize("place", ["", "memory/"])
def test_xe_tells_the_total_of_its_tiles_and_no_use(tmp_path: Path, place: str) -> None:
    tree(
        tmp_path,
        {
            "card0/device/vendor": "0x8086",
            "card0/device/uevent": uevent("xe", "8086:E20B", "0000:03:00.0"),
            f"card0/device/tile0/{place}physical_vram_size_bytes": str(8 * GIB),
            f"card0/device/tile1/{place}physical_vram_size_bytes": str(8 * GIB),
        },
    )
    assert DrmCards(tmp_path).cards() == [Card("intel", 0, "Intel GPU 8086:e20b", "0000:03:00.0", 16 * GIB, None)]


def test_an_integrated_card_has_no_memory_of_its_own(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "card0/device/vendor": "0x8086",
            "card0/device/uevent": uevent("i915", "8086:A7A0", "0000:00:02.0"),
        },
    )
    assert DrmCards(tmp_path).cards() == [Card("intel", 0, "Intel GPU 8086:a7a0", "0000:00:02.0", None, None)]


def test_a_machine_without_cards_and_files_that_are_no_numbers(tmp_path: Path) -> None:
    assert DrmCards(tmp_path / "nothing").cards() == []
    tree(tmp_path, {"card0/device/vendor": "0x1002", "card0/device/mem_info_vram_total": "", "card0/device/uevent": ""})
    assert DrmCards(tmp_path).cards() == [Card("amd", 0, "AMD GPU", "", None, None)]
