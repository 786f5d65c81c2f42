"""The planner: a table of situations, and what holds in all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.residency.planner import DeviceMemory, Evict, Load, Plan, Refuse, Resident, Wait, plan

CPU = DeviceMemory("cpu", total_bytes=100, free_bytes=40)


def resident(key: str, held_bytes: int, **facts: object) -> Resident:
    return replace(Resident(key, "cpu", held_bytes), **facts)  # type: ignore[arg-type]


OLD = resident("old", 30, last_used=1)
NEW = resident("new", 30, last_used=2)
BUSY = resident("busy", 30, last_used=0, busy=True)


@pytest.mark.parametrize(
    ("residents", "needed", "expected"),
    [
        pytest.param([], 40, Load("cpu"), id="fits exactly"),
        pytest.param([], 41, Refuse("cpu", 41, 40), id="too big for the empty machine"),
        pytest.param([OLD, NEW], 40, Load("cpu"), id="fits beside others"),
        pytest.param([OLD, NEW], 41, Evict("cpu", ("old",)), id="least recently used goes"),
        pytest.param([OLD, NEW], 71, Evict("cpu", ("old", "new")), id="as many as needed"),
        pytest.param([OLD, NEW], 101, Refuse("cpu", 101, 100), id="whoever leaves"),
        pytest.param([BUSY, NEW], 41, Evict("cpu", ("new",)), id="busy stays although older"),
        pytest.param([BUSY], 41, Wait("cpu", ("busy",)), id="waits for busy"),
        pytest.param([BUSY, NEW], 71, Wait("cpu", ("busy",)), id="evicts nobody while it has to wait anyway"),
        pytest.param([replace(OLD, pinned=True)], 41, Refuse("cpu", 41, 40), id="pinned stays"),
        pytest.param([replace(BUSY, pinned=True)], 41, Refuse("cpu", 41, 40), id="pinned stays, busy or not"),
        pytest.param([replace(OLD, leaving=True), NEW], 70, Wait("cpu", ("old",)), id="who leaves anyway suffices"),
        pytest.param([replace(OLD, leaving=True), NEW], 71, Evict("cpu", ("new",)), id="who leaves counts"),
        pytest.param([replace(OLD, unseen_bytes=30)], 40, Evict("cpu", ("old",)), id="mapped weights are not free"),
        pytest.param([replace(BUSY, unseen_bytes=30)], 10, Load("cpu"), id="what loads now is not free"),
        pytest.param(
            [resident("small", 1, last_used=1), resident("big", 50, last_used=2)],
            80,
            Evict("cpu", ("big",)),
            id="a victim that frees too little is spared",
        ),
    ],
)
def test_situations(residents: list[Resident], needed: int, expected: Plan) -> None:
    assert plan([CPU], residents, needed_bytes=needed, reserve_bytes=0) == expected


def test_reserve_stays_free() -> None:
    assert plan([CPU], [], needed_bytes=30, reserve_bytes=10) == Load("cpu")
    assert plan([CPU], [], needed_bytes=31, reserve_bytes=10) == Refuse("cpu", 31, 30)


def test_of_equal_devices_the_emptier_is_taken() -> None:
    gpus = [DeviceMemory("gpu0", 100, 50), DeviceMemory("gpu1", 100, 60)]
    assert plan(gpus, [], needed_bytes=10, reserve_bytes=0) == Load("gpu1")
    idle = [Resident("a", "gpu0", 20, last_used=2), Resident("b", "gpu1", 30, last_used=1)]
    assert plan(gpus, idle, needed_bytes=65, reserve_bytes=0) == Evict("gpu0", ("a",))


def test_loading_elsewhere_beats_evicting() -> None:
    gpus = [DeviceMemory("gpu0", 100, 5), DeviceMemory("gpu1", 100, 60)]
    assert plan(gpus, [Resident("a", "gpu0", 95)], needed_bytes=10, reserve_bytes=0) == Load("gpu1")


def test_without_devices_there_is_no_plan() -> None:
    with pytest.raises(ValueError, match="no devices"):
        plan([], [], needed_bytes=1, reserve_bytes=0)


sizes = st.integers(0, 1000)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[DeviceMemory], list[Resident], int, int]:
    ids = draw(st.sampled_from([["cpu"], ["gpu0", "gpu1"]]))
    devices = [DeviceMemory(id, 4000, draw(sizes)) for id in ids]
    residents = []
    for number in range(draw(st.integers(0, 6))):
        held = draw(sizes)
        residents.append(
            Resident(
                str(number),
                draw(st.sampled_from(ids)),
                held,
                unseen_bytes=draw(st.integers(0, held)),
                busy=draw(st.booleans()),
                last_used=draw(st.integers(0, 3)),
                pinned=draw(st.booleans()),
                leaving=draw(st.booleans()),
            )
        )
    return devices, residents, draw(st.integers(1, 3000)), draw(st.integers(0, 200))


@given(situations())
def test_every_plan_is_sound(situation: tuple[list[DeviceMemory], list[Resident], int, int]) -> None:
    devices, residents, needed, reserve = situation
    decision = plan(devices, residents, needed_bytes=needed, reserve_bytes=reserve)
    by_key = {r.key: r for r in residents}

    def room(device: str, *, gone: set[str]) -> int:
        (memory,) = (d for d in devices if d.id == device)
        here = [r for r in residents if r.device == device]
        unseen = sum(r.unseen_bytes for r in here)
        return memory.free_bytes - reserve - unseen + sum(r.held_bytes for r in here if r.key in gone)

    leaving = {r.key for r in residents if r.leaving}
    movable = {r.key for r in residents if r.leaving or not r.pinned}
    fits_now = [d.id for d in devices if room(d.id, gone=set()) >= needed]
    match decision:
        case Load(device):
            assert device in fits_now
        case Evict(device, victims):
            assert not fits_now
            assert victims
            for key in victims:
                assert not by_key[key].busy
                assert not by_key[key].pinned
                assert not by_key[key].leaving
                assert by_key[key].device == device
            assert room(device, gone=leaving | set(victims)) >= needed
            for key in victims:
                assert room(device, gone=leaving | set(victims) - {key}) < needed, "a redundant victim"
        case Wait(device, holders):
            assert not fits_now
            assert holders
            assert all(by_key[key].busy or by_key[key].leaving for key in holders)
            assert room(device, gone=movable) >= needed
        case Refuse(device, refused_bytes, free_bytes):
            assert refused_bytes == needed > free_bytes
            assert all(room(d.id, gone=movable) < needed for d in devices), "refused what fits an empty machine"
            assert free_bytes == max(0, room(device, gone=movable))


@given(situations())
def test_more_free_memory_never_makes_it_worse(situation: tuple[list[DeviceMemory], list[Resident], int, int]) -> None:
    devices, residents, needed, reserve = situation
    # Evicting and waiting count as one: with more room it may suffice to wait for those who leave anyway.
    ranks = {Load: 0, Evict: 1, Wait: 1, Refuse: 2}

    def rank(devices: list[DeviceMemory]) -> int:
        return ranks[type(plan(devices, residents, needed_bytes=needed, reserve_bytes=reserve))]

    assert rank([replace(device, free_bytes=device.free_bytes + 100) for device in devices]) <= rank(devices)
