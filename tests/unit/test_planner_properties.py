"""What holds for every plan, whatever is on the machine."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.residency.planner import plan
from lmd.daemon.residency.plans import CPU, Action, Ask, DeviceMemory, Held, Need, Plan, Resident
from lmd.daemon.residency.turns import patience_s, turn_s

sizes = st.integers(0, 1000)
seconds = st.sampled_from([0.0, 0.5, 3.0, 40.0, 500.0])
IDS = [CPU, "cuda0", "cuda1", "vulkan0"]


@st.composite
def needs(draw: st.DrawFn) -> Need:
    layers = tuple(draw(st.lists(st.integers(1, 300), min_size=0, max_size=6)))
    output, held_back, compute, beside, parked = (draw(st.integers(1, 200)) for _ in range(5))
    placed = sum(layers) + output + compute + beside
    return Need(
        num_ctx=draw(st.sampled_from([1024, 4096])),
        layers=layers,
        output_bytes=output,
        input_bytes=held_back,
        compute_bytes=compute,
        beside_bytes=beside,
        parked_bytes=parked,
        cpu_bytes=placed + held_back + parked,
        gpu_bytes=placed,
        host_bytes=held_back + parked,
    )


@st.composite
def residents(draw: st.DrawFn, key: str) -> Resident:
    held = []
    for device in draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=3, unique=True)):
        bytes_ = draw(sizes)
        held.append(Held(device, bytes_, draw(st.integers(0, bytes_))))
    return Resident(
        key,
        tuple(held),
        busy=draw(st.booleans()),
        pinned=draw(st.booleans()),
        leaving=draw(st.booleans()),
        idle_s=draw(seconds),
        stay_s=draw(st.sampled_from([0.0, 0.0, 0.3])),
        again_s=draw(st.sampled_from([0.0, 0.0, 0.3])),
        resident_s=draw(seconds),
        reload_s=draw(seconds),
        answer_s=draw(seconds),
        priority=draw(st.integers(0, 1)),
    )


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[DeviceMemory], list[Resident], Ask, int]:
    devices = [DeviceMemory(id, 4000, draw(sizes)) for id in draw(st.sampled_from([[CPU], IDS[:2], IDS[:3], IDS]))]
    others = [draw(residents(str(number))) for number in range(draw(st.integers(0, 6)))]
    ask = Ask(
        "new",
        "new",
        tuple(draw(st.lists(needs(), min_size=1, max_size=2))),
        num_gpu=draw(st.sampled_from([-1, -1, 0, 2, 99])),
        priority=draw(st.integers(0, 1)),
        waited_s=draw(seconds),
    )
    return devices, others, ask, draw(st.integers(0, 100))


def missing(
    decided: Plan, devices: list[DeviceMemory], others: list[Resident], reserve_bytes: int, gone: set[str]
) -> int:
    """The bytes that the place lacks when those in *gone* are gone."""
    lacks = 0
    for share in decided.placement.shares:
        (device,) = (device for device in devices if device.id == share.device)
        here = [(r.key, part) for r in others for part in r.held if part.device == share.device]
        free = device.free_bytes - reserve_bytes - sum(part.unseen_bytes for _, part in here)
        free += sum(part.held_bytes for key, part in here if key in gone)
        lacks += max(0, share.bytes - free)
    return lacks


@given(situations())
def test_every_plan_is_sound(situation: tuple[list[DeviceMemory], list[Resident], Ask, int]) -> None:
    devices, others, ask, reserve = situation
    decided = plan(devices, others, ask, reserve_bytes=reserve)
    by_key = {r.key: r for r in others}
    chosen = [by_key[key] for key in decided.others]
    leaving = {r.key for r in others if r.leaving}
    movable = leaving | {r.key for r in others if not r.pinned}

    def lacks(gone: set[str]) -> int:
        return missing(decided, devices, others, reserve, gone)

    assert decided.reason
    match decided.action:
        case Action.LOAD:
            assert lacks(set()) == 0
        case Action.EVICT:
            assert lacks(leaving) > 0
            assert lacks(leaving | set(decided.others)) == 0
            assert not any(r.busy or r.pinned or r.leaving for r in chosen)
            for key in decided.others:
                assert lacks(leaving | set(decided.others) - {key}) > 0, "a redundant victim"
        case Action.TURN:
            idle = {r.key for r in others if not (r.busy or r.pinned)}
            assert lacks(leaving | idle | set(decided.others)) == 0
            for r in chosen:
                assert r.busy
                assert not r.pinned
                assert not r.leaving
                assert r.priority <= ask.priority
                assert r.resident_s >= turn_s(r)
                assert ask.waited_s >= patience_s(r)
                assert lacks(leaving | idle | set(decided.others) - {r.key}) > 0, "a redundant turn"
        case Action.WAIT:
            assert lacks(set()) > 0
            assert lacks(movable) == 0
            assert chosen
            assert not any(r.pinned and not r.leaving for r in chosen)
        case Action.REFUSE:
            assert decided.needed_bytes > decided.free_bytes
            assert lacks(movable) > 0, "refused what fits when everyone leaves"


@given(situations())
def test_layers_lie_where_they_were_counted(situation: tuple[list[DeviceMemory], list[Resident], Ask, int]) -> None:
    devices, others, ask, reserve = situation
    placement = plan(devices, others, ask, reserve_bytes=reserve).placement
    (need, *_) = [need for need in ask.needs if need.num_ctx == placement.num_ctx]
    counts = [sum(share.layers for share in placement.shares)]
    assert counts[0] in [need.layer_count for need in ask.needs]
    assert len({share.device.rstrip("0123456789") for share in placement.accelerators}) <= 1, "split across backends"
    assert sum(share.bytes for share in placement.shares) >= min(n.cpu_bytes for n in ask.needs) - need.compute_bytes


@given(situations())
def test_more_free_memory_never_refuses_more(
    situation: tuple[list[DeviceMemory], list[Resident], Ask, int],
) -> None:
    devices, others, ask, reserve = situation

    def is_refused(devices: list[DeviceMemory]) -> bool:
        return plan(devices, others, ask, reserve_bytes=reserve).action is Action.REFUSE

    more = [replace(device, free_bytes=device.free_bytes + 100) for device in devices]
    assert is_refused(devices) or not is_refused(more)
