"""Clients that ask for more models than fit, on the real ledger: no runners, and a clock that jumps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lmd.daemon.residency.decisions import Usage
from lmd.daemon.residency.ledger import Ledger
from lmd.daemon.residency.plans import Ask, DeviceMemory, Held, Plan
from lmd.daemon.residency.turns import AnswerTimes
from tests.support.least_recently_used import lru_loads
from tests.support.virtual_loop import VirtualLoop

MODEL_BYTES = 100


@dataclass(frozen=True)
class Load:
    """What clients do to a machine; times in seconds.

    Attributes:
        models: how many there are.
        room: how many of them fit.
        clients: each asks for a model at random, as soon as it has an answer.
        reload_s: how long a load takes.
        answer_s: how long answers take; each is one of these.
        think_s: how long a client waits before it asks again.
    """

    models: int = 3
    room: int = 2
    clients: int = 6
    reload_s: float = 0.5
    answer_s: tuple[float, ...] = (0.2, 0.8, 1.6)
    think_s: float = 0.0
    duration_s: float = 300.0


@dataclass
class Outcome:
    """What became of it."""

    arrivals: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    loads: int = 0
    elapsed_s: float = 0.0
    most_held: int = 0
    evicted_busy: int = 0

    def fair_share_s(self, clients: int) -> float:
        """The time in which each client has one answer when all have the same share."""
        return clients * self.elapsed_s / len(self.waits_s)

    def lru_loads(self, room: int) -> int:
        """How many loads the same arrivals take when the least recently used model leaves."""
        return lru_loads(self.arrivals, room)


class _Model:
    """One model: what an actor does, and no more."""

    def __init__(self, world: _World, key: str) -> None:
        self.world = world
        self.key = key
        self.ready = self.leaving = self.shared = False
        self.waiting: dict[asyncio.Future[None], float] = {}
        self.running = 0
        self.last_used = self.loaded_at = self.pause_s = 0.0
        self.load_s = 0.0
        self.answers = AnswerTimes()
        self.task: asyncio.Task[None] | None = None

    async def answer(self, seconds: float) -> None:
        """Serve one request."""
        loop = asyncio.get_running_loop()
        if self.ready and not self.leaving:
            if not self.running:
                pause_s = max(loop.time() - self.last_used, 1e-3)
                self.pause_s = (self.pause_s + pause_s) / 2 if self.pause_s else pause_s
            self.running += 1
            self.shared |= self.running > 1
        else:
            place = loop.create_future()
            self.waiting[place] = loop.time()
            if self.task is None and not self.ready:
                self.task = asyncio.create_task(self.load())
            await place
        await asyncio.sleep(seconds)
        self.answers.note(seconds)
        self.running -= 1
        self.last_used = loop.time()
        self.world.ledger.changed()
        if self.leaving and not self.running:
            self.gone()

    async def load(self) -> None:
        loop = asyncio.get_running_loop()
        world = self.world
        ask = replace(
            Ask.of_bytes(self.key, self.key, MODEL_BYTES, "cpu"),
            waited_s=loop.time() - min(self.waiting.values()),
        )
        await world.ledger.admit(ask, timeout_s=1e6, on_wait=_ignore)
        world.outcome.loads += 1
        await asyncio.sleep(world.load.reload_s)
        world.free_bytes -= MODEL_BYTES
        world.outcome.most_held = max(world.outcome.most_held, world.load.room * MODEL_BYTES - world.free_bytes)
        world.ledger.settle(self.key, [Held("cpu", MODEL_BYTES)])
        self.ready, self.loaded_at, self.pause_s, self.load_s = True, loop.time(), 0.0, world.load.reload_s
        self.last_used = loop.time()
        self.task = None
        self.running += len(self.waiting)
        self.shared = self.running > 1
        for place in self.waiting:
            place.set_result(None)
        self.waiting.clear()

    def usage(self) -> Usage:
        return Usage(
            busy=not self.ready or self.running > 0,
            last_used=self.last_used,
            pinned=False,
            leaving=self.leaving and not self.running,
            queued=len(self.waiting),
            reload_s=self.load_s,
            loaded_at=self.loaded_at if self.ready else 0.0,
            pause_s=self.pause_s,
            answer_s=self.answers.mean_s,
            shared=self.shared,
        )

    def evict(self) -> None:
        if self.running or not self.ready:
            self.world.outcome.evicted_busy += 1
        elif not self.leaving:
            self.leaving = True
            asyncio.get_running_loop().call_later(0.02, self.gone)

    def yield_turn(self) -> None:
        self.leaving = True

    def gone(self) -> None:
        self.ready = self.leaving = False
        self.world.free_bytes += MODEL_BYTES
        self.world.ledger.release(self.key)
        if self.waiting and self.task is None:
            self.task = asyncio.create_task(self.load())


class _World:
    def __init__(self, load: Load) -> None:
        self.load = load
        self.outcome = Outcome()
        self.free_bytes = load.room * MODEL_BYTES
        self.models = {f"m{number}": _Model(self, f"m{number}") for number in range(load.models)}
        self.ledger = Ledger(
            read_devices=self.read,
            reserve_bytes=0,
            usage=lambda key: self.models[key].usage(),
            evict=lambda key, reason: self.models[key].evict(),
            yield_turn=lambda key, reason: self.models[key].yield_turn(),
            keep_turn=_ignore,
        )

    async def read(self) -> Sequence[DeviceMemory]:
        return [DeviceMemory("cpu", self.load.room * MODEL_BYTES, self.free_bytes)]

    async def client(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        choose = random.Random(f"swaps/{number}")
        while loop.time() < self.load.duration_s:
            key, answer_s = choose.choice(list(self.models)), choose.choice(self.load.answer_s)
            self.outcome.arrivals.append(key)
            asked = loop.time()
            await self.models[key].answer(answer_s)
            self.outcome.waits_s.append(loop.time() - asked - answer_s)
            await asyncio.sleep(self.load.think_s)

    async def run(self) -> Outcome:
        await asyncio.gather(*(self.client(number) for number in range(self.load.clients)))
        self.outcome.elapsed_s = asyncio.get_running_loop().time()
        return self.outcome


def run_swaps(load: Load) -> Outcome:
    """Let the clients ask for so long, and return what became of it."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_World(load).run())


def _ignore(_: Plan | str) -> None:
    """Nobody is told, and nobody gives up."""
