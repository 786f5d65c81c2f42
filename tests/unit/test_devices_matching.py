"""How the three sources become one list: a table of machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmd.daemon.devices.inventory import keep_ids
from lmd.daemon.devices.matching import Readings, devices_of, shortfall
from lmd.daemon.devices.values import Card, Device, EngineDevice, Probed

GIB = 1 << 30
MEMORY = Device("cpu", "main memory", 64 * GIB, 50 * GIB)
L4 = Card("nvidia", 0, "NVIDIA L4", "0000:01:00.0", 24 * GIB, 20 * GIB)
CUDA0 = EngineDevice("cuda0", "cuda", "gpu", "NVIDIA L4", "0000:01:00.0", 24 * GIB - 5, 23 * GIB)
VULKAN0 = replace(CUDA0, id="vulkan0", backend="vulkan")
IGPU = EngineDevice("vulkan1", "vulkan", "igpu", "Intel Graphics", "0000:00:02.0", 32 * GIB, 31 * GIB)
CUDA = frozenset({"cuda"})


def machine(*devices: EngineDevice, cards: tuple[Card, ...] = (), **more: object) -> list[Device]:
    readings = Readings(Probed(devices), cards, MEMORY, backends=CUDA)
    return devices_of(replace(readings, **more))  # type: ignore[arg-type]


def test_main_memory_alone() -> None:
    assert machine() == [MEMORY]
    assert shortfall([MEMORY]) == ""


def test_the_drivers_figures_count_so_that_other_programs_do() -> None:
    [_, gpu] = machine(CUDA0, cards=(L4,))
    assert (gpu.id, gpu.total_bytes, gpu.free_bytes, gpu.usable) == ("cuda0", 24 * GIB, 20 * GIB, True)


def test_without_a_driver_that_tells_the_engines_figure_is_carried_on_with_what_we_hold() -> None:
    def free_bytes(held: int, held_then: int) -> int:
        return machine(CUDA0, held={"cuda0": held}, held_then={"cuda0": held_then})[1].free_bytes

    assert free_bytes(0, 0) == 23 * GIB
    assert free_bytes(5 * GIB, 0) == 18 * GIB
    assert free_bytes(0, 1 * GIB) == 24 * GIB - 5, "never more than there is"
    assert free_bytes(40 * GIB, 0) == 0


def test_a_slice_of_a_card_is_not_measured_by_the_figures_of_the_whole() -> None:
    mig = replace(CUDA0, total_bytes=10 * GIB, free_bytes=9 * GIB)
    [_, gpu] = machine(mig, cards=(L4,), held={"cuda0": GIB})
    assert (gpu.total_bytes, gpu.free_bytes) == (10 * GIB, 8 * GIB)
    [_, gpu] = machine(mig, cards=(replace(L4, free_bytes=2 * GIB),))
    assert gpu.free_bytes == 2 * GIB, "but no slice has more than the card"


def test_a_lost_card_has_no_memory_and_says_why() -> None:
    [_, gpu] = found = machine(CUDA0, cards=(replace(L4, fault="GPU is lost", free_bytes=0),))
    assert (gpu.usable, gpu.free_bytes, gpu.reason) == (False, 0, "GPU is lost")
    assert shortfall(found) == "cuda0 (NVIDIA L4) cannot be used: GPU is lost"


def test_a_card_that_the_driver_no_longer_shows_is_lost() -> None:
    [_, gpu] = machine(CUDA0, cards_then=frozenset({"0000:01:00.0"}))
    assert (gpu.usable, gpu.reason) == (False, "its driver does not show it any more")
    assert machine(CUDA0)[1].usable, "one that no driver ever showed is the engine's word alone"


def test_a_device_whose_memory_the_engine_cannot_read_is_not_used() -> None:
    [_, gpu] = machine(replace(CUDA0, total_bytes=0, free_bytes=0))
    assert (gpu.usable, gpu.reason) == (False, "the engine cannot read its memory")


def test_of_two_ways_to_a_card_the_engines_first_is_used() -> None:
    [_, first, second] = machine(CUDA0, VULKAN0, cards=(L4,))
    assert first.usable
    assert (second.usable, second.reason) == (False, "the same card as cuda0, which is used")


def test_the_other_way_to_a_lost_card_is_lost_too() -> None:
    assert not any(d.usable for d in machine(CUDA0, VULKAN0, cards=(replace(L4, fault="GPU is lost"),))[1:])


def test_integrated_devices_are_used_only_where_there_is_no_card() -> None:
    [_, igpu] = machine(IGPU)
    assert (igpu.usable, igpu.unified, igpu.free_bytes) == (True, True, 32 * GIB)
    [_, igpu, _] = machine(IGPU, VULKAN0)
    assert (igpu.usable, igpu.reason) == (False, "shares main memory, and there is a card with its own")
    assert machine(IGPU, replace(IGPU, id="vulkan2", bus_id=""))[2].reason == (
        "shares main memory, as does the one that is used"
    )


def test_what_an_integrated_device_can_have_is_bounded_by_main_memory() -> None:
    small = replace(MEMORY, free_bytes=3 * GIB)
    assert machine(IGPU, memory=small)[1].free_bytes == 3 * GIB
    assert machine(IGPU, held={"vulkan1": 30 * GIB})[1].free_bytes == 2 * GIB


@pytest.mark.parametrize(
    ("probed", "backends", "reason"),
    [
        (Probed(), frozenset(), "the engine is built without CUDA or Vulkan"),
        (Probed(), frozenset({"rocm"}), "the engine is built without CUDA or Vulkan"),
        (None, CUDA, "the engine has not been asked yet"),
        (Probed(fault="the engine's probe died (SIGABRT)"), CUDA, "the engine's probe died (SIGABRT)"),
        (
            Probed(limits={"CUDA_VISIBLE_DEVICES": "-1"}),
            CUDA,
            "the engine does not find it; CUDA_VISIBLE_DEVICES=-1 may hide it",
        ),
        (Probed(), CUDA, "the engine does not find it; its driver may be too old, or lack a part"),
    ],
)
def test_a_card_that_the_engine_does_not_offer_is_listed_with_the_reason(
    probed: Probed | None, backends: frozenset[str], reason: str
) -> None:
    [_, card] = found = devices_of(Readings(probed, (L4,), MEMORY, backends=backends))
    assert (card.id, card.backend, card.usable, card.reason) == ("nvidia0", "", False, reason)
    assert shortfall(found) == f"nvidia0 (NVIDIA L4) cannot be used: {reason}"


def test_an_integrated_card_that_the_engine_cannot_use_is_no_shortfall() -> None:
    iris = Card("intel", 0, "Intel GPU 8086:a7a0", "0000:00:02.0")
    found = devices_of(Readings(Probed(), (iris,), MEMORY))
    assert found[1].reason == "the engine is built without SYCL or Vulkan"
    assert shortfall(found) == ""


def test_one_card_that_works_is_no_shortfall() -> None:
    second = replace(L4, number=1, bus_id="0000:02:00.0", fault="GPU is lost")
    assert shortfall(machine(CUDA0, cards=(L4, second))) == ""


def test_devices_keep_their_ids_when_the_engine_numbers_them_anew() -> None:
    a, b = CUDA0, replace(CUDA0, id="cuda1", bus_id="0000:02:00.0")
    c = replace(CUDA0, bus_id="0000:03:00.0")
    assert keep_ids((), (a, b)) == (a, b)
    # The first card died; a new process calls the second one "cuda0".
    [left] = keep_ids((a, b), (replace(b, id="cuda0"),))
    assert (left.id, left.bus_id) == ("cuda1", b.bus_id)
    # A new card does not take the name of one that may come back, nor that of one that is there.
    assert [d.id for d in keep_ids((a, b), (replace(c, id="cuda0"), replace(b, id="cuda1")))] == ["cuda2", "cuda1"]


def test_devices_without_an_address_are_called_as_the_engine_does() -> None:
    metal = EngineDevice("metal0", "metal", "igpu", "Apple M4", "", 16 * GIB, 12 * GIB)
    assert keep_ids((metal,), (metal,)) == (metal,)
