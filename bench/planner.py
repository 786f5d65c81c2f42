"""The planner's speed: plans over many models and devices, of every kind.

    python -m bench.planner [--plans 1000] [--json FILE]

50 models of 2 to 70 billion weights lie on a machine with 8 devices: main memory, four accelerators of one backend and
three of another. Every plan is for another model, with three contexts to choose from, and another picture of who is
busy, pinned or idle. The bar is 1,000 plans in a second. Exit status 1 says that it was missed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lmd.daemon.residency.planner import plan
from lmd.daemon.residency.plans import CPU, Ask, DeviceMemory, Held, Need, Resident

MODELS = 50
LIMIT_S = 1.0
_GB = 10**9
_RESERVE_BYTES = 512 << 20
_DEVICES = [
    DeviceMemory(CPU, 256 * _GB, 60 * _GB),
    *(DeviceMemory(f"cuda{number}", 24 * _GB, (2 + 3 * number) * _GB) for number in range(4)),
    *(DeviceMemory(f"vulkan{number}", 16 * _GB, (1 + 2 * number) * _GB) for number in range(3)),
]


@dataclass(frozen=True, slots=True)
class Speed:
    """How long the plans took, in seconds, and what they were."""

    plans: int
    total_s: float
    median_s: float
    slowest_s: float
    actions: dict[str, int]

    @property
    def thousand_s(self) -> float:
        """The time of a thousand plans."""
        return self.total_s * 1000 / self.plans


def measure(plans: int) -> Speed:
    """Make so many plans."""
    chance = random.Random("planner")
    situations = [(_residents(chance), _ask(chance)) for _ in range(plans)]
    times, actions = [], Counter[str]()
    for residents, ask in situations:
        begin = time.perf_counter()
        made = plan(_DEVICES, residents, ask, reserve_bytes=_RESERVE_BYTES)
        times.append(time.perf_counter() - begin)
        actions[made.action.value] += 1
    return Speed(plans, sum(times), statistics.median(times), max(times), dict(actions))


def _residents(chance: random.Random) -> Sequence[Resident]:
    found = []
    for number in range(MODELS - 1):
        device = chance.choice(_DEVICES)
        held = [Held(device.id, int(chance.uniform(0.2, 3) * _GB))]
        if device.id != CPU:
            held.append(Held(CPU, int(chance.uniform(0.1, 0.5) * _GB), int(0.1 * _GB)))
        busy = chance.random() < 0.3
        found.append(
            Resident(
                f"sha256:{number:064}",
                tuple(held),
                name=f"model{number}:latest",
                busy=busy,
                pinned=chance.random() < 0.1,
                idle_s=0 if busy else chance.uniform(0, 600),
                resident_s=chance.uniform(0, 3600),
                reload_s=chance.uniform(0.5, 30),
                answer_s=chance.uniform(0.5, 20),
            )
        )
    return found


def _ask(chance: random.Random) -> Ask:
    weights_bytes, layers = chance.choice([(1.2, 26), (4.9, 32), (8.5, 40), (20, 64), (42, 80)])
    needs = []
    for num_ctx in (8192, 4096, 2048):
        layer = int((weights_bytes / layers + num_ctx * 8192 / _GB) * _GB)
        output, held_back, compute = int(0.5 * _GB), int(0.3 * _GB), int(0.4 * _GB)
        placed = layer * layers + output + compute
        needs.append(
            Need(
                num_ctx=num_ctx,
                layers=(layer,) * layers,
                output_bytes=output,
                input_bytes=held_back,
                compute_bytes=compute,
                beside_bytes=0,
                parked_bytes=0,
                cpu_bytes=placed + held_back,
                gpu_bytes=placed,
                host_bytes=held_back,
            )
        )
    return Ask("new", "new:latest", tuple(needs), waited_s=chance.choice([0.0, 20.0, 90.0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=1000, metavar="COUNT", help="default: 1000")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    speed = measure(options.plans)
    if options.json:
        options.json.write_text(json.dumps({**asdict(speed), "thousand_s": speed.thousand_s}, indent=2) + "\n")
    decided = ", ".join(f"{count} {action}" for action, count in sorted(speed.actions.items()))
    print(f"{speed.plans} plans over {MODELS} models and {len(_DEVICES)} devices: {decided}")
    print(
        f"{speed.thousand_s:.3f} s for 1,000 (the bar is {LIMIT_S:g} s); "
        f"median {speed.median_s * 1e6:.0f} µs, slowest {speed.slowest_s * 1e6:.0f} µs"
    )
    sys.exit(speed.thousand_s > LIMIT_S)


if __name__ == "__main__":
    main()
