"""Requests to a residency, each with what became of it, and a judgement whether that may be."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from lmd.daemon.errors import (
    AnswersTooLong,
    DeviceMemoryShort,
    DeviceUnavailable,
    Draining,
    HandedBack,
    ModelIncompatible,
    QueueFull,
    RunnerCrashed,
    RunnerHung,
    RunnerStartTimeout,
    TemplateFailed,
    Unloaded,
)
from lmd.daemon.residency.residency import Residency
from lmd.daemon.residency.values import LoadSettings
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.residents import Model

#: How long after a fault requests that come then may still be told of it, in seconds: a crash is not noticed at once,
#: a refusal of the engine holds while the pause lasts, a silent load or runner is noticed when its time is over.
AFTERMATH_S: dict[type[Exception], float] = {
    RunnerCrashed: 0.5,
    MemoryError: 5.0,
    RunnerHung: 90.0,
    RunnerStartTimeout: 400.0,
    ModelIncompatible: 45.0,
    TemplateFailed: 45.0,
    Unloaded: 0.5,
    DeviceUnavailable: 1e9,
}


@dataclass(eq=False)
class Request:
    """One request, from the moment it was made."""

    model: Model
    settings: LoadSettings
    keep_alive: timedelta | None
    caller: str
    prompt: str
    expected: str
    asked_at: float
    batch: bool = False
    task: asyncio.Task[str] = field(init=False)
    cancelled: bool = False
    ended_at: float | None = None
    ends: int = 0

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.task.done()

    async def run(self, residency: Residency) -> str:
        """Do what a request does; return the text."""
        again = False
        try:
            while True:
                try:
                    return await self._try(residency, again)
                except HandedBack:
                    again = True
        finally:
            self.ended_at = asyncio.get_running_loop().time()

    async def _try(self, residency: Residency, again: bool) -> str:
        with residency.enqueue(
            self.model, self.settings, self.keep_alive, caller=self.caller, again=again, batch=self.batch
        ) as ticket:
            await ticket.wait()
            answer = await ticket.runner.submit(frames.Submit(prompt=self.prompt, caller=self.caller))
            answer.when_ended(self._note_end)
            pieces = []
            try:
                while not answer.ended:
                    await answer.changed()
                    pieces += [delta.text for delta in answer.take()]
                if answer.error is None:
                    return "".join(pieces)
                if isinstance(answer.error, HandedBack):
                    assert answer.started is None, "an answer that began was handed back"
                    self.ends -= 1
                raise answer.error
            finally:
                answer.close()

    def _note_end(self) -> None:
        self.ends += 1


class Requests:
    """All requests of a run, and the faults that may explain how they end."""

    def __init__(self, residency: Residency, loop: asyncio.AbstractEventLoop, *, wait_s: float, max_queue: int) -> None:
        self.all: list[Request] = []
        self.draining = False
        #: How often each model was loaded by name: such calls stand in its queue, too.
        self.explicit_loads: Counter[str] = Counter()
        self._residency = residency
        self._loop = loop
        self._wait_s = wait_s
        self._max_queue = max_queue
        self._faults: dict[str, list[tuple[float, type[Exception]]]] = defaultdict(list)

    def ask(
        self,
        model: Model,
        settings: LoadSettings,
        *,
        keep_alive: timedelta | None = None,
        caller: str = "",
        prompt: str = "word",
        expected: str = "word ",
        batch: bool = False,
    ) -> Request:
        """Make a request."""
        request = Request(model, settings, keep_alive, caller, prompt, expected, self._loop.time(), batch)
        request.task = self._loop.create_task(request.run(self._residency))
        self.all.append(request)
        return request

    def note_fault(self, name: str, error: type[Exception]) -> None:
        """Note that requests for a model may be told of *error* from now on, and for a while."""
        self._faults[name].append((self._loop.time(), error))

    def open(self, model: Model | None = None) -> list[Request]:
        """Return those that have not ended, oldest first."""
        return [r for r in self.all if not r.over and (model is None or r.model is model)]

    def judge(self, may_be_short: Judge) -> list[str]:
        """Return what is wrong with the requests that have ended and were not looked at yet."""
        wrong = []
        rest = []
        for request in self.all:
            if not request.over:
                rest.append(request)
                continue
            if (fault := self._fault_of(request, may_be_short)) is not None:
                wrong.append(f"{request.model.name} {request.settings} of {request.caller}: {fault}")
        self.all = rest
        return wrong

    def _fault_of(self, request: Request, may_be_short: Judge) -> str | None:
        if request.ends > 1:
            return "its answer ended twice"
        if request.task.cancelled():
            return None if request.cancelled else "it was cancelled by nobody"
        error = request.task.exception()
        if error is None:
            text = request.task.result()
            return None if text == request.expected else f"it got {text!r}"
        return None if self._may_be(error, request, may_be_short) else f"nothing explains {error!r}"

    def _may_be(self, error: BaseException, request: Request, may_be_short: Judge) -> bool:
        assert request.ended_at is not None
        match error:
            case Draining():
                return self.draining
            case QueueFull():
                beside = len(self._beside(request)) + self.explicit_loads[request.model.name]
                return beside >= self._max_queue * 3 // 4
            case DeviceMemoryShort() if error.waited_s:
                return self._waited(request)
            case DeviceMemoryShort():
                return self._explained(MemoryError, request) or may_be_short(request)
            case AnswersTooLong():
                return self._waited(request)
            case _:
                return self._explained(type(error), request)

    def _waited(self, request: Request) -> bool:
        """Tell whether it has itself waited its time."""
        assert request.ended_at is not None
        return request.ended_at - request.asked_at >= self._wait_s

    def _beside(self, request: Request) -> Sequence[Request]:
        # Judged soon after the end, so those that were there then are there still, or ended in the same step.
        return [r for r in self.all if r is not request and r.model is request.model]

    def _explained(self, error: type[BaseException], request: Request) -> bool:
        assert request.ended_at is not None
        return any(
            cause is error and request.asked_at - AFTERMATH_S[cause] <= at <= request.ended_at
            for at, cause in self._faults[request.model.name]
        )


class Judge:
    """Tells whether a request may have been refused for lack of memory."""

    def __call__(self, request: Request) -> bool:
        raise NotImplementedError
