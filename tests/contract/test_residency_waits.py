"""How long a request waits for memory and for running answers: its own time, whoever waits with it.

Runners are tasks on a loop with a virtual clock, so that minutes take no time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmd.daemon.errors import AnswersTooLong, DeviceMemoryShort, HandedBack
from lmd.daemon.residency.requests import BATCH_AGES_S
from lmd.daemon.residency.values import LoadSettings, RunnerState
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.in_process import Host
from tests.support.residents import LIMITS, SETTINGS, Model, World
from tests.support.virtual_loop import VirtualLoop

WAIT_S = 100
LARGE = LoadSettings(num_ctx=4096)


class Scene:
    """A residency on virtual time: 1000 bytes, of which a model takes 600 unless a test says otherwise."""

    def __init__(self, directory: Path) -> None:
        self.loop = VirtualLoop()
        self.world = World(directory, host=Host(), free_bytes=1000, limits=replace(LIMITS, wait_s=WAIT_S))
        self.world.memory.unknown_bytes = 600
        self.directory = directory
        #: Requests in the order in which they ended.
        self.ended: list[asyncio.Task[str]] = []

    def state(self, model: Model) -> RunnerState | None:
        async def look() -> RunnerState | None:
            return self.world.state(model)

        return self.loop.run_until_complete(look())

    def model(self, name: str, **script: Any) -> Model:
        return self.world.model(name, memory_bytes=600, **script)

    def ask(
        self, model: Model, prompt: str, settings: LoadSettings = SETTINGS, *, batch: bool = False
    ) -> asyncio.Task[str]:
        """Begin a request that waits as long as it takes."""
        task = self.loop.create_task(self._ask(model, prompt, settings, batch))
        task.add_done_callback(self.ended.append)
        self.loop.settle()
        return task

    async def _ask(self, model: Model, prompt: str, settings: LoadSettings, batch: bool) -> str:
        again, pieces = False, []
        while True:
            with self.world.residency.enqueue(model, settings, again=again, batch=batch) as ticket:
                await ticket.wait()
                answer = await ticket.runner.submit(frames.Submit(prompt=prompt))
                try:
                    while not answer.ended:
                        await answer.changed()
                        pieces += [delta.text for delta in answer.take()]
                finally:
                    answer.close()
                if answer.error is None:
                    return "".join(pieces)
                if not isinstance(answer.error, HandedBack):
                    raise answer.error
                again = True


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    closing = made.loop.create_task(made.world.close())
    made.loop.advance(120)
    closing.result()
    made.loop.dissolve()


def ended_at(scene: Scene, task: asyncio.Task[str]) -> float:
    """Let time pass until a task has ended; return when that was."""
    while not task.done():
        scene.loop.advance(1)
    return scene.loop.time()


# Each its own time


def test_who_joins_a_wait_for_memory_has_its_own_time(scene: Scene) -> None:
    """Whoever asked a moment before the end of another one's wait was refused with it."""
    busy, wanted = scene.model("busy"), scene.model("wanted")
    scene.ask(busy, "hold")
    scene.loop.advance(10)
    begun = scene.loop.time()
    first = scene.ask(wanted, "first")
    scene.loop.advance(60)
    second = scene.ask(wanted, "second")
    assert ended_at(scene, first) == pytest.approx(begun + WAIT_S, abs=2)
    assert not second.done()
    assert ended_at(scene, second) == pytest.approx(begun + 60 + WAIT_S, abs=2)
    for refused in (first, second):
        with pytest.raises(DeviceMemoryShort, match=r"waited 100 s for memory of cpu: 600 B needed, 400 B free"):
            refused.result()


def test_a_load_goes_on_for_those_who_still_wait(scene: Scene) -> None:
    busy, wanted = scene.model("busy"), scene.model("wanted")
    gate = scene.directory / "gate"
    running = scene.ask(busy, f"gate {gate}")
    scene.loop.advance(10)
    first = scene.ask(wanted, "first")
    scene.loop.advance(60)
    second = scene.ask(wanted, "second")
    ended_at(scene, first)
    gate.touch()
    ended_at(scene, second)
    assert (running.result(), second.result()) == ("x", "second ")
    assert isinstance(first.exception(), DeviceMemoryShort)


def test_when_those_who_wanted_more_have_given_up_the_load_asks_for_less(scene: Scene) -> None:
    scene.world.memory.needs("ctx=1024", 300)
    busy, wanted = scene.model("busy"), scene.model("wanted")
    scene.ask(busy, "hold", LARGE)
    scene.loop.advance(10)
    larger = scene.ask(wanted, "larger", LARGE)
    scene.loop.advance(60)
    smaller = scene.ask(wanted, "smaller", SETTINGS)
    until = ended_at(scene, larger)
    assert isinstance(larger.exception(), DeviceMemoryShort)
    assert ended_at(scene, smaller) <= until + 2
    assert smaller.result() == "smaller "


def test_who_joins_a_reload_has_its_own_time(scene: Scene) -> None:
    """It was refused with those before it, and told that a load made no progress which had not begun."""
    model = scene.model("a")
    scene.ask(model, "hold")
    scene.loop.advance(10)
    begun = scene.loop.time()
    first = scene.ask(model, "first", LARGE)
    scene.loop.advance(60)
    second = scene.ask(model, "second", LARGE)
    behind = scene.ask(model, "behind")
    assert ended_at(scene, first) == pytest.approx(begun + WAIT_S, abs=2)
    assert not second.done()
    assert ended_at(scene, second) == pytest.approx(begun + 60 + WAIT_S, abs=2)
    for refused in (first, second):
        with pytest.raises(AnswersTooLong, match="waited 100 s for running answers of model `a:latest` to finish"):
            refused.result()
    scene.loop.advance(1)
    assert behind.result() == "behind "
    assert scene.state(model) is RunnerState.READY


def test_the_time_in_which_a_load_reads_weights_does_not_count(scene: Scene) -> None:
    """Only waits for memory and for answers have this deadline; a load that makes progress may take long."""
    model = scene.model("a", gate=str(scene.directory / "loaded"))
    running = scene.ask(model, f"gate {scene.directory / 'gate'}")
    scene.loop.advance(1)
    larger = scene.ask(model, "larger", LARGE)
    scene.loop.advance(25)
    (scene.directory / "loaded").touch()
    scene.loop.advance(WAIT_S - 10)
    assert not larger.done()
    (scene.directory / "gate").touch()
    ended_at(scene, larger)
    assert (running.result(), larger.result()) == ("x", "larger ")


# Batch requests


def test_who_answers_comes_before_a_batch_that_has_waited_longer(scene: Scene) -> None:
    busy, batch, chat = scene.model("busy"), scene.model("batch"), scene.model("chat")
    gate = scene.directory / "gate"
    scene.ask(busy, f"gate {gate}")
    scene.loop.advance(10)
    of_batch = scene.ask(batch, "batch", batch=True)
    scene.loop.advance(2)
    of_chat = scene.ask(chat, "chat")
    gate.touch()
    ended_at(scene, of_batch)
    assert scene.ended.index(of_chat) < scene.ended.index(of_batch)
    assert (of_chat.result(), of_batch.result()) == ("chat ", "batch ")


def test_a_batch_has_aged_after_a_while_and_keeps_its_place(scene: Scene) -> None:
    busy, batch, chat = scene.model("busy"), scene.model("batch"), scene.model("chat")
    gate = scene.directory / "gate"
    scene.ask(busy, f"gate {gate}")
    scene.loop.advance(10)
    of_batch = scene.ask(batch, "batch", batch=True)
    scene.loop.advance(BATCH_AGES_S - 5)
    of_chat = scene.ask(chat, "chat")
    scene.loop.advance(6)
    gate.touch()
    ended_at(scene, of_chat)
    assert scene.ended.index(of_batch) < scene.ended.index(of_chat)


def test_an_interactive_request_that_joins_a_batch_makes_it_urgent(scene: Scene) -> None:
    busy, batch, chat = scene.model("busy"), scene.model("batch"), scene.model("chat")
    gate = scene.directory / "gate"
    scene.ask(busy, f"gate {gate}")
    scene.loop.advance(10)
    of_batch = scene.ask(batch, "batch", batch=True)
    of_chat = scene.ask(chat, "chat")
    scene.loop.advance(1)
    joined = scene.ask(batch, "joined")
    gate.touch()
    ended_at(scene, of_chat)
    assert scene.ended.index(of_batch) < scene.ended.index(of_chat)
    assert joined.done()


def test_what_only_batches_use_leaves_first(scene: Scene) -> None:
    """It was used last, and would be the last to go otherwise."""
    scene.world.free_bytes = 1800
    chat, batch, wanted = scene.model("chat"), scene.model("batch"), scene.model("wanted")
    ended_at(scene, scene.ask(chat, "x"))
    scene.loop.advance(100)
    ended_at(scene, scene.ask(batch, "x", batch=True))
    scene.world.free_bytes = 1500
    ended_at(scene, scene.ask(wanted, "x"))
    assert scene.state(chat) is RunnerState.READY
    assert scene.state(batch) is not RunnerState.READY


@pytest.mark.parametrize(("batch", "yields"), [(True, False), (False, True)])
def test_a_batch_makes_no_busy_model_yield_before_it_has_aged(scene: Scene, batch: bool, yields: bool) -> None:
    busy, wanted = scene.model("busy"), scene.model("wanted")
    scene.ask(busy, "hold")
    scene.loop.advance(30)
    scene.ask(wanted, "x", batch=batch)
    scene.loop.advance(BATCH_AGES_S - 1)
    assert (scene.state(busy) is RunnerState.DRAINING) == yields
    scene.loop.advance(2)
    assert scene.state(busy) is RunnerState.DRAINING
