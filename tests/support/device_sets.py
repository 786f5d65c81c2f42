"""Machines with the devices that a JSON document describes, behind the same interfaces as the real ones.

    {"memory": {"total_bytes": 64, "free_bytes": 60},
     "backends": ["cuda"],
     "cards": [{"vendor": "nvidia", "number": 0, "description": "…", "bus_id": "0000:01:00.0",
                "total_bytes": 24, "free_bytes": 23, "fault": ""}],
     "probed": {"devices": [{"id": "cuda0", "backend": "cuda", "kind": "gpu", "description": "…",
                             "bus_id": "0000:01:00.0", "total_bytes": 24, "free_bytes": 24}],
                "limits": {}, "fault": ""}}

Everything but the memory may be left out. The document is read anew each time, so a test changes the machine by writing
it. `python -m tests.support.device_sets FILE` is a daemon on such a machine; its runners are real.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmd.daemon.devices import Device, Inventory
from lmd.daemon.devices.values import CPU, Card, EngineDevice, Probed

GIB = 1 << 30


@dataclass
class SimulatedMachine:
    """Reads the document *file*; `write` replaces it."""

    file: Path
    probes: int = field(default=0, init=False)

    def write(self, document: Mapping[str, Any]) -> None:
        staged = self.file.with_suffix(".new")
        staged.write_text(json.dumps(document))
        staged.rename(self.file)

    def inventory(self, **more: Any) -> Inventory:
        return Inventory(cards=[self], probe=self.probe, memory=self.memory, backends=self.backends, **more)

    def cards(self) -> Sequence[Card]:
        return [Card(**fields) for fields in self._part("cards", [])]

    def look_again(self) -> None:
        return

    def memory(self) -> Device:
        return Device(CPU, "main memory", **self._part("memory", {}))

    def backends(self) -> frozenset[str]:
        return frozenset(self._part("backends", []))

    async def probe(self) -> Probed:
        self.probes += 1
        answer = self._part("probed", {})
        devices = tuple(EngineDevice(**fields) for fields in answer.get("devices", []))
        return Probed(devices, answer.get("limits", {}), answer.get("fault", ""))

    def _part(self, name: str, default: Any) -> Any:
        return json.loads(self.file.read_text()).get(name, default)


def card(
    number: int = 0, *, total_gib: float = 24, free_gib: float = 23, fault: str = "", **more: Any
) -> dict[str, Any]:
    """A card of NVIDIA's in a document."""
    return {
        "vendor": "nvidia",
        "number": number,
        "description": "NVIDIA L4",
        "bus_id": f"0000:0{number + 1}:00.0",
        "total_bytes": int(total_gib * GIB),
        "free_bytes": int(free_gib * GIB),
        "fault": fault,
    } | more


def offered(number: int = 0, *, total_gib: float = 24, free_gib: float = 23, **more: Any) -> dict[str, Any]:
    """The same card as the engine offers it."""
    return {
        "id": f"cuda{number}",
        "backend": "cuda",
        "kind": "gpu",
        "description": "NVIDIA L4",
        "bus_id": f"0000:0{number + 1}:00.0",
        "total_bytes": int(total_gib * GIB),
        "free_bytes": int(free_gib * GIB),
    } | more


def machine_with(
    *cards: dict[str, Any], devices: Sequence[dict[str, Any]] | None = None, **more: Any
) -> dict[str, Any]:
    """A document: 64 GiB of main memory, *cards*, and the engine that offers each of them or just *devices*."""
    if devices is None:
        devices = [offered(card["number"]) for card in cards]
    return {
        "memory": {"total_bytes": 64 * GIB, "free_bytes": 60 * GIB},
        "backends": ["cuda"],
        "cards": list(cards),
        "probed": {"devices": list(devices)},
    } | more


def main() -> int:
    """Run the daemon; return its exit status."""
    from lmd.daemon.app import Application
    from lmd.daemon.main import launch

    machine = SimulatedMachine(Path(sys.argv[1]))

    class SimulatedApplication(Application):
        def make_inventory(self) -> Inventory:
            return machine.inventory(look_s=0.1)

    return launch(os.environ, lambda: SimulatedApplication)


if __name__ == "__main__":
    sys.exit(main())
