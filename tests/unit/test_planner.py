"""The policy of residency as a table: what is on the machine, what is asked for, and what is decided.

All bytes are small numbers: a layer of the model in `LAYERED` takes 10, its output 10, its scratch memory 5 on each
device, and its input 3 of main memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from lmd.daemon.residency.planner import plan
from lmd.daemon.residency.plans import CPU, Action, Ask, DeviceMemory, Held, Need, Plan, Resident, Share
from lmd.daemon.residency.turns import again_s, stay_s

MAIN = DeviceMemory(CPU, total_bytes=100, free_bytes=40)


def gpu(number: int, free_bytes: int, backend: str = "cuda") -> DeviceMemory:
    return DeviceMemory(f"{backend}{number}", total_bytes=100, free_bytes=free_bytes)


def resident(key: str, held_bytes: int, device: str = CPU, *, unseen_bytes: int = 0, **facts: object) -> Resident:
    return replace(Resident(key, (Held(device, held_bytes, unseen_bytes),)), **facts)  # type: ignore[arg-type]


def flat(needed_bytes: int, **facts: object) -> Ask:
    """An ask for bytes that cannot be divided."""
    return replace(Ask("new", "new", (Need.flat(needed_bytes),)), **facts)  # type: ignore[arg-type]


def layered(num_ctx: int = 0, layer_bytes: int = 10, layers: int = 3) -> Need:
    """A model of 3 layers and the output: 45 on one accelerator and 3 of main memory, or 48 of that alone."""
    whole = layer_bytes * layers + 10 + 5
    return Need(
        num_ctx=num_ctx,
        layers=(layer_bytes,) * layers,
        output_bytes=10,
        input_bytes=3,
        compute_bytes=5,
        beside_bytes=0,
        parked_bytes=0,
        cpu_bytes=whole + 3,
        gpu_bytes=whole,
        host_bytes=3,
    )


LAYERED = Ask("new", "new", (layered(),))


def decide(devices: Sequence[DeviceMemory], residents: Sequence[Resident], ask: Ask, reserve_bytes: int = 0) -> Plan:
    return plan(devices, residents, ask, reserve_bytes=reserve_bytes)


OLD = resident("old", 30, idle_s=100)
NEW = resident("fresh", 30, idle_s=10)
BUSY = resident("busy", 30, busy=True, resident_s=1)
#: It can be waited for 0.4 * 5 + 2.8 * 10 = 30 s, and its turn is 0.5 * 5 + 10 = 12.5 s.
LONG = resident("long", 30, busy=True, resident_s=500, reload_s=5, answer_s=10)


@pytest.mark.parametrize(
    ("residents", "needed", "action", "others"),
    [
        pytest.param([], 40, Action.LOAD, (), id="fits exactly"),
        pytest.param([], 41, Action.REFUSE, (), id="too big for the empty machine"),
        pytest.param([OLD, NEW], 40, Action.LOAD, (), id="fits beside others"),
        pytest.param([OLD, NEW], 41, Action.EVICT, ("old",), id="of two that are alike, the longest idle goes"),
        pytest.param([OLD, NEW], 71, Action.EVICT, ("old", "fresh"), id="as many as needed"),
        pytest.param([OLD, NEW], 101, Action.REFUSE, (), id="does not fit, whoever leaves"),
        pytest.param([BUSY, NEW], 41, Action.EVICT, ("fresh",), id="busy stays"),
        pytest.param([BUSY], 41, Action.WAIT, ("busy",), id="waits for busy"),
        pytest.param([BUSY, NEW], 71, Action.WAIT, ("busy",), id="evicts nobody while it has to wait anyway"),
        pytest.param([replace(OLD, pinned=True)], 41, Action.REFUSE, (), id="pinned stays"),
        pytest.param([replace(BUSY, pinned=True)], 41, Action.REFUSE, (), id="pinned stays, busy or not"),
        pytest.param([replace(OLD, leaving=True), NEW], 70, Action.WAIT, ("old",), id="who leaves anyway suffices"),
        pytest.param([replace(OLD, leaving=True), NEW], 71, Action.EVICT, ("fresh",), id="who leaves counts"),
        pytest.param(
            [resident("mapped", 30, unseen_bytes=30)], 40, Action.EVICT, ("mapped",), id="mapped weights are not free"
        ),
        pytest.param(
            [resident("loads", 30, unseen_bytes=30, busy=True)], 10, Action.LOAD, (), id="what loads now is not free"
        ),
        pytest.param(
            [resident("small", 1, idle_s=200), resident("big", 50)],
            80,
            Action.EVICT,
            ("big",),
            id="a victim that frees too little is spared",
        ),
        pytest.param(
            [resident("slow", 30, idle_s=30, reload_s=60), resident("quick", 30, reload_s=2)],
            41,
            Action.EVICT,
            ("quick",),
            id="what loads quickly goes before what loads slowly",
        ),
        pytest.param(
            [resident("slow", 30, idle_s=3600, reload_s=60), resident("quick", 30, reload_s=2)],
            41,
            Action.EVICT,
            ("slow",),
            id="unless nobody has used it for long",
        ),
        pytest.param(
            [resident("a", 12, reload_s=3), resident("b", 12, reload_s=3), resident("c", 25, reload_s=4)],
            60,
            Action.EVICT,
            ("c",),
            id="one that costs less than two together",
        ),
        pytest.param([replace(OLD, priority=1), NEW], 41, Action.EVICT, ("fresh",), id="the lower priority goes first"),
    ],
)
def test_who_leaves(residents: list[Resident], needed: int, action: Action, others: tuple[str, ...]) -> None:
    decided = decide([MAIN], residents, flat(needed))
    assert (decided.action, decided.others) == (action, others)


@pytest.mark.parametrize(
    ("residents", "waited_s", "action", "others"),
    [
        pytest.param([LONG], 0, Action.WAIT, ("long",), id="who has just come disturbs nobody"),
        pytest.param([LONG], 29.9, Action.WAIT, ("long",), id="who has patience left waits"),
        pytest.param([LONG], 30, Action.TURN, ("long",), id="after that the other yields"),
        pytest.param([replace(LONG, reload_s=50)], 30, Action.WAIT, ("long",), id="what loads slowly is left longer"),
        pytest.param([replace(LONG, answer_s=20)], 30, Action.WAIT, ("long",), id="and so is what answers slowly"),
        pytest.param([replace(LONG, reload_s=500)], 60, Action.TURN, ("long",), id="but no longer than a minute"),
        pytest.param([replace(LONG, resident_s=12.4)], 60, Action.WAIT, ("long",), id="its turn has to be over"),
        pytest.param([replace(LONG, resident_s=12.5)], 60, Action.TURN, ("long",), id="and then it is"),
        pytest.param([replace(LONG, resident_s=0)], 60, Action.WAIT, ("long",), id="who loads has its turn before it"),
        pytest.param([replace(LONG, pinned=True)], 60, Action.REFUSE, (), id="pinned yields to nobody"),
        pytest.param([replace(LONG, priority=1)], 60, Action.WAIT, ("long",), id="nor does the higher priority"),
        pytest.param([replace(LONG, priority=-1)], 0, Action.TURN, ("long",), id="who has less is not waited for"),
        pytest.param(
            [replace(LONG, priority=-1, resident_s=12.4)], 0, Action.WAIT, ("long",), id="but its turn has to be over"
        ),
        pytest.param([replace(OLD, priority=-1, stay_s=9)], 0, Action.EVICT, ("old",), id="nor does it stay a moment"),
        pytest.param([replace(LONG, leaving=True)], 60, Action.WAIT, ("long",), id="who yields already is waited for"),
        pytest.param(
            [LONG, resident("longer", 30, busy=True, resident_s=600, reload_s=5)],
            30,
            Action.TURN,
            ("longer",),
            id="the longest turn ends first",
        ),
        pytest.param([LONG, OLD], 30, Action.EVICT, ("old",), id="nobody yields while idle ones suffice"),
        pytest.param(
            [replace(OLD, stay_s=0.2), BUSY],
            0,
            Action.WAIT,
            ("old", "busy"),
            id="who is asked soon again stays a moment",
        ),
        pytest.param(
            [replace(OLD, stay_s=0.2), BUSY], 0.1, Action.EVICT, ("old",), id="unless somebody has no patience left"
        ),
    ],
)
def test_turns(residents: list[Resident], waited_s: float, action: Action, others: tuple[str, ...]) -> None:
    decided = decide([MAIN], residents, flat(41, waited_s=waited_s))
    assert (decided.action, decided.others) == (action, others)


ROOMY = DeviceMemory(CPU, 1000, 1000)
TIGHT = DeviceMemory(CPU, 1000, 2)


@pytest.mark.parametrize(
    ("devices", "residents", "ask", "action", "shares"),
    [
        pytest.param(
            [ROOMY, gpu(0, 50), gpu(1, 60)],
            [],
            LAYERED,
            Action.LOAD,
            (Share("cuda1", 45, 4), Share(CPU, 3)),
            id="whole on the roomiest accelerator",
        ),
        pytest.param(
            [ROOMY, gpu(0, 5), gpu(1, 60)],
            [resident("a", 95, "cuda0")],
            LAYERED,
            Action.LOAD,
            (Share("cuda1", 45, 4), Share(CPU, 3)),
            id="loading elsewhere beats evicting",
        ),
        pytest.param(
            [ROOMY, gpu(0, 30), gpu(1, 30)],
            [],
            LAYERED,
            Action.LOAD,
            (Share("cuda0", 25, 2), Share("cuda1", 25, 2), Share(CPU, 3)),
            id="split across two when none holds it",
        ),
        pytest.param(
            [ROOMY, gpu(0, 20), gpu(1, 40)],
            [],
            LAYERED,
            Action.LOAD,
            (Share("cuda1", 35, 3), Share("cuda0", 15, 1), Share(CPU, 3)),
            id="split in proportion to the room",
        ),
        pytest.param(
            [ROOMY, gpu(0, 30), gpu(1, 30)],
            [resident("a", 30, "cuda0")],
            LAYERED,
            Action.LOAD,
            (Share("cuda0", 25, 2), Share("cuda1", 25, 2), Share(CPU, 3)),
            id="splitting beats evicting",
        ),
        pytest.param(
            [ROOMY, gpu(0, 30), gpu(1, 30, "vulkan")],
            [],
            LAYERED,
            Action.LOAD,
            (Share("cuda0", 25, 2), Share(CPU, 28, 2)),
            id="never split across backends: a part instead",
        ),
        pytest.param(
            [ROOMY, gpu(0, 10)],
            [resident("a", 40, "cuda0")],
            LAYERED,
            Action.EVICT,
            (Share("cuda0", 45, 4), Share(CPU, 3)),
            id="evicting beats a part",
        ),
        pytest.param(
            [ROOMY, gpu(0, 10)],
            [resident("a", 40, "cuda0", busy=True)],
            LAYERED,
            Action.WAIT,
            (Share("cuda0", 45, 4), Share(CPU, 3)),
            id="waiting for all of it beats a part, and main memory",
        ),
        pytest.param(
            [ROOMY, gpu(0, 10)],
            [resident("a", 40, "cuda0", pinned=True)],
            LAYERED,
            Action.LOAD,
            (Share(CPU, 48, 4),),
            id="main memory when pinned models hold the accelerator",
        ),
        pytest.param(
            [ROOMY, gpu(0, 14)],
            [],
            LAYERED,
            Action.LOAD,
            (Share(CPU, 48, 4),),
            id="a part of less than a quarter is not worth it",
        ),
        pytest.param(
            [ROOMY, gpu(0, 15)],
            [],
            LAYERED,
            Action.LOAD,
            (Share("cuda0", 15, 1), Share(CPU, 38, 3)),
            id="a quarter is",
        ),
        pytest.param(
            [ROOMY, gpu(0, 20)],
            [resident("a", 15, "cuda0")],
            LAYERED,
            Action.EVICT,
            (Share("cuda0", 35, 3), Share(CPU, 18, 1)),
            id="idle models leave for a larger part",
        ),
        pytest.param(
            [ROOMY, gpu(0, 20)],
            [resident("a", 15, "cuda0", busy=True)],
            LAYERED,
            Action.LOAD,
            (Share("cuda0", 15, 1), Share(CPU, 38, 3)),
            id="nobody waits for a larger part",
        ),
        pytest.param(
            [TIGHT, gpu(0, 50)], [], LAYERED, Action.REFUSE, (Share(CPU, 48, 4),), id="the input needs main memory too"
        ),
        pytest.param(
            [ROOMY, gpu(0, 50)],
            [],
            replace(LAYERED, num_gpu=2),
            Action.LOAD,
            (Share("cuda0", 25, 2), Share(CPU, 28, 2)),
            id="a number of layers is taken at its word",
        ),
        pytest.param(
            [ROOMY, gpu(0, 50)],
            [],
            replace(LAYERED, num_gpu=99),
            Action.LOAD,
            (Share("cuda0", 45, 4), Share(CPU, 3)),
            id="more layers than there are means all",
        ),
        pytest.param(
            [ROOMY, gpu(0, 40)],
            [],
            replace(LAYERED, num_gpu=99),
            Action.REFUSE,
            (Share("cuda0", 45, 4), Share(CPU, 3)),
            id="and main memory does not stand in",
        ),
        pytest.param(
            [ROOMY, gpu(0, 50)],
            [],
            replace(LAYERED, num_gpu=0),
            Action.LOAD,
            (Share(CPU, 48, 4),),
            id="no layers on accelerators",
        ),
        pytest.param(
            [ROOMY], [], replace(LAYERED, num_gpu=99), Action.LOAD, (Share(CPU, 48, 4),), id="without accelerators"
        ),
        pytest.param(
            [ROOMY, gpu(0, 50), gpu(1, 90)],
            [],
            Ask.of_bytes("lease", "lease", 20, "cuda0"),
            Action.LOAD,
            (Share("cuda0", 20, 1),),
            id="a lease goes where it says",
        ),
        pytest.param(
            [ROOMY, gpu(0, 10), gpu(1, 90)],
            [],
            Ask.of_bytes("lease", "lease", 20, "cuda0"),
            Action.REFUSE,
            (Share("cuda0", 20, 1),),
            id="and nowhere else",
        ),
    ],
)
def test_where_it_goes(
    devices: list[DeviceMemory], residents: list[Resident], ask: Ask, action: Action, shares: tuple[Share, ...]
) -> None:
    decided = decide(devices, residents, ask)
    assert (decided.action, decided.placement.shares) == (action, shares)


WISHES = Ask("new", "new", (layered(4096, 20), layered(2048, 10)))


@pytest.mark.parametrize(
    ("devices", "residents", "action", "num_ctx"),
    [
        pytest.param([ROOMY, gpu(0, 80)], [], Action.LOAD, 4096, id="the wanted context fits"),
        pytest.param([ROOMY, gpu(0, 50)], [], Action.LOAD, 2048, id="a smaller one keeps it on the accelerator"),
        pytest.param(
            [ROOMY, gpu(0, 50)],
            [resident("a", 30, "cuda0")],
            Action.EVICT,
            4096,
            id="evicting beats a smaller one",
        ),
        pytest.param(
            [ROOMY, gpu(0, 50)],
            [resident("a", 30, "cuda0", busy=True)],
            Action.WAIT,
            4096,
            id="and so does waiting",
        ),
        pytest.param([DeviceMemory(CPU, 90, 60)], [], Action.LOAD, 2048, id="main memory holds the smaller one only"),
        pytest.param([ROOMY, gpu(0, 5)], [], Action.LOAD, 4096, id="in main memory it is the wanted one"),
    ],
)
def test_context_is_sized_to_what_fits(
    devices: list[DeviceMemory], residents: list[Resident], action: Action, num_ctx: int
) -> None:
    decided = decide(devices, residents, WISHES)
    assert (decided.action, decided.placement.num_ctx) == (action, num_ctx)


@pytest.mark.parametrize(
    ("devices", "residents", "ask", "words"),
    [
        pytest.param([ROOMY, gpu(0, 90)], [], LAYERED, "fits on cuda0: 45 B needed, 90 B free", id="load"),
        pytest.param(
            [MAIN],
            [NEW, replace(OLD, reload_s=4)],
            flat(45),
            "`fresh` leaves (idle for 10 s, holds 30 B) for a place on main memory: 45 B needed, 40 B free",
            id="evict",
        ),
        pytest.param(
            [MAIN],
            [BUSY],
            flat(41),
            "waits for memory that `busy` holds, on main memory: 41 B needed, 40 B free",
            id="wait",
        ),
        pytest.param(
            [MAIN],
            [LONG],
            flat(41, waited_s=40),
            "`long` yields (its turn has lasted 8 min), after a wait of 40 s, on main memory: 41 B needed, 40 B free",
            id="turn",
        ),
        pytest.param(
            [MAIN], [OLD], flat(71), "does not fit on main memory: 71 B needed, 70 B can be freed", id="refuse"
        ),
        pytest.param(
            [DeviceMemory(CPU, 1000, 20)],
            [],
            WISHES,
            "does not fit on main memory even with a context of 2048 tokens instead of 4096: 48 B needed, "
            "20 B can be freed",
            id="refuse any context",
        ),
        pytest.param(
            [ROOMY, gpu(0, 25)], [], LAYERED, "fits with 2 of 4 layers on cuda0: 25 B needed, 25 B free", id="part"
        ),
        pytest.param(
            [ROOMY, gpu(0, 50)],
            [],
            WISHES,
            "fits on cuda0 with a context of 2048 tokens instead of 4096: 45 B needed, 50 B free",
            id="context",
        ),
        pytest.param(
            [ROOMY, gpu(0, 30), gpu(1, 30)],
            [],
            LAYERED,
            "fits on cuda0 and cuda1: 25 B needed on cuda0, 30 B free; 25 B needed on cuda1, 30 B free",
            id="split",
        ),
    ],
)
def test_reasons(devices: list[DeviceMemory], residents: list[Resident], ask: Ask, words: str) -> None:
    assert decide(devices, residents, ask).reason == words


def test_reserve_stays_free() -> None:
    assert decide([MAIN], [], flat(30), reserve_bytes=10).action is Action.LOAD
    refused = decide([MAIN], [], flat(31), reserve_bytes=10)
    assert (refused.action, refused.device, refused.needed_bytes, refused.free_bytes) == (Action.REFUSE, CPU, 31, 30)


def test_victims_leave_where_that_costs_least() -> None:
    gpus = [gpu(0, 50), gpu(1, 60)]
    idle = [resident("a", 20, "cuda0", reload_s=3), resident("b", 30, "cuda1", reload_s=9)]
    decided = decide(gpus, idle, flat(65, devices=("cuda0", "cuda1")))
    assert (decided.placement.device, decided.others) == ("cuda0", ("a",))


def test_a_split_frees_each_of_its_devices() -> None:
    across = Resident("across", (Held("cuda0", 20), Held("cuda1", 20)), idle_s=10)
    other = resident("other", 20, "cuda0")
    decided = decide([ROOMY, gpu(0, 5), gpu(1, 10)], [across, other], LAYERED)
    assert (decided.action, decided.placement.device, set(decided.others)) == (
        Action.EVICT,
        "cuda0",
        {"across", "other"},
    )


@pytest.mark.parametrize("devices", [[], [MAIN]])
def test_without_devices_there_is_no_plan(devices: list[DeviceMemory]) -> None:
    with pytest.raises(ValueError, match="none of the devices"):
        decide(devices, [], flat(1, devices=("cuda0",)))


@pytest.mark.parametrize(
    ("idle_s", "expected_s"),
    [
        pytest.param(0, 6, id="six answers"),
        pytest.param(4, 2, id="the time that it was idle counts"),
        pytest.param(60, 0, id="not for ever"),
    ],
)
def test_what_several_use_stays_a_moment(idle_s: float, expected_s: float) -> None:
    assert stay_s(idle_s=idle_s, reload_s=2, answer_s=1) == expected_s


@pytest.mark.parametrize(
    ("pause_s", "idle_s", "expected_s"),
    [
        pytest.param(0, 0, 0, id="it was asked once"),
        pytest.param(0.3, 0, 2, id="asked again within the time of a load"),
        pytest.param(0.3, 1.5, 0.5, id="the time that it was idle counts"),
        pytest.param(30, 0, 0, id="asked again too seldom"),
    ],
)
def test_what_is_asked_again_and_again_stays_a_moment(pause_s: float, idle_s: float, expected_s: float) -> None:
    assert again_s(pause_s=pause_s, idle_s=idle_s, reload_s=2) == expected_s


def test_a_lone_client_does_not_wait_for_himself() -> None:
    """What is asked again and again stays only for an ask that has waited while it was asked."""
    soon = resident("soon", 30, idle_s=0.1, again_s=0.4, reload_s=2)
    assert decide([MAIN], [soon], flat(41)).action is Action.EVICT
    assert decide([MAIN], [soon], flat(41, waited_s=0.2)).action is Action.WAIT
