"""The requests that one runner serves: answers, which are streams, and calls, which have one reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from lmd.daemon.deadline import Deadline
from lmd.daemon.futures import fail, resolve
from lmd.daemon.runner_answer import Answer, error_of
from lmd.daemon.runner_link import RunnerLink
from lmd.daemon.runner_queue import RunnerQueue
from lmd.registry.errors import LmdError
from lmd.runner.v1 import frames_pb2 as frames

#: The weight of the newest answer in the running mean of how long answers take.
_NEWEST = 0.2


@dataclass(frozen=True, slots=True)
class _Call:
    reply: asyncio.Future[frames.RunnerFrame]
    deadline: Deadline
    caller: str


class RunnerRequests:
    """Numbers requests, sends them, and gives each what the runner says to it; every one ends exactly once.

    Answers and calls share one space of ids. What a runner says to an id that nobody knows is dropped: the request
    was taken back meanwhile.
    """

    def __init__(self, name: str, link: RunnerLink, log_tail: Callable[[], str]) -> None:
        #: Requests that the runner finished.
        self.served = 0
        #: How long answers take once they have a slot, in the mean over the last few; 0 when there was none.
        self.mean_answer_s = 0.0
        self.queue = RunnerQueue()
        self.name = name
        self._link = link
        self._log_tail = log_tail
        self._last_id = 0
        self._answers: dict[int, Answer] = {}
        self._calls: dict[int, _Call] = {}

    def __len__(self) -> int:
        return len(self._answers) + len(self._calls)

    @property
    def pending(self) -> int:
        """Answers that have no slot, and calls that have no reply: which of those wait only the runner knows."""
        return len(self.queue) + len(self._calls)

    def pending_of(self, caller: str) -> int:
        """Return how many of the pending are of *caller*."""
        return self.queue.waiting_of(caller) + sum(call.caller == caller for call in self._calls.values())

    @property
    def busy(self) -> int:
        """Answers that have a slot."""
        return len(self._answers) - len(self.queue)

    async def submit(self, submit: frames.Submit, deadline: Deadline) -> Answer:
        """Hand in a request for an answer; its id and its time-out are set here."""
        submit.request_id = self._next_id()
        submit.timeout_ms = deadline.left_ms
        answer = Answer(submit.request_id, self._cancel, deadline)
        self._answers[answer.request_id] = answer
        self.queue.add(answer.request_id, submit.caller)
        self._link.send(frames.DaemonFrame(submit=submit))
        try:
            async with asyncio.timeout(deadline.within(None)):
                await self._link.writable()
        except TimeoutError:
            answer.close()
            raise deadline.error() from None
        except asyncio.CancelledError:
            answer.close()
            raise
        return answer

    async def call(self, frame: frames.DaemonFrame, deadline: Deadline) -> frames.RunnerFrame:
        """Hand in a request that has one reply, and return the reply; its id and its time-out are set here."""
        request_id = self._next_id()
        match frame.WhichOneof("frame"):
            case "embed":
                frame.embed.request_id, frame.embed.timeout_ms = request_id, deadline.left_ms
            case "tokenize":
                frame.tokenize.request_id = request_id
            case "detokenize":
                frame.detokenize.request_id = request_id
            case "render":
                frame.render.request_id = request_id
            case other:
                raise ValueError(f"a frame `{other}` has no reply")
        call = _Call(asyncio.get_running_loop().create_future(), deadline, frame.embed.caller)
        self._calls[request_id] = call
        self._link.send(frame)
        try:
            async with asyncio.timeout(deadline.within(None)):
                await self._link.writable()
                return await call.reply
        except TimeoutError:
            raise deadline.error() from None
        finally:
            if self._calls.pop(request_id, None) is not None:
                self._link.send(frames.DaemonFrame(cancel=frames.Cancel(request_id=request_id)))

    def take(self, kind: str | None, frame: frames.RunnerFrame) -> None:
        """Handle what the runner says to its requests; *kind* is which frame it is."""
        match kind:
            case "delta":
                if (answer := self._answers.get(frame.delta.request_id)) is not None:
                    answer.note_delta(frame.delta)
            case "started":
                if (answer := self._answers.get(frame.started.request_id)) is not None:
                    self.queue.discard(answer.request_id)
                    answer.note_started(frame.started)
            case "queue":
                self.queue.reorder(frame.queue.request_ids)
            case "finished":
                self._finish(frame.finished)
            case "failed":
                self._fail(frame.failed)
            case "embedded":
                self._reply(frame.embedded.request_id, frame)
            case "tokenized":
                self._reply(frame.tokenized.request_id, frame)
            case "detokenized":
                self._reply(frame.detokenized.request_id, frame)
            case "rendered":
                self._reply(frame.rendered.request_id, frame)

    def hand_back(self, error: Callable[[], LmdError]) -> int:
        """Take back the answers that have no slot, and fail them with *error*; return how many there were."""
        waiting = list(self.queue)
        for request_id in waiting:
            self._cancel(request_id)
            if (answer := self._end_of(request_id)) is not None:
                answer.note_error(error())
        return len(waiting)

    def end(self, error: Callable[[], LmdError]) -> None:
        """Fail all that is left: the runner is gone."""
        answers, calls = list(self._answers.values()), list(self._calls.values())
        self._answers.clear()
        self._calls.clear()
        self.queue.clear()
        for answer in answers:
            answer.note_error(error())
        for call in calls:
            fail(call.reply, error())

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _finish(self, finished: frames.Finished) -> None:
        if (answer := self._end_of(finished.request_id)) is not None:
            self.served += 1
            took_s = (finished.prompt_ns + finished.generate_ns) / 1e9
            self.mean_answer_s += (took_s - self.mean_answer_s) * (_NEWEST if self.mean_answer_s else 1.0)
            answer.note_finished(finished)

    def _fail(self, failed: frames.Failed) -> None:
        if (answer := self._end_of(failed.request_id)) is not None:
            answer.note_error(self._error_of(failed, answer.deadline))
        elif (call := self._calls.pop(failed.request_id, None)) is not None:
            fail(call.reply, self._error_of(failed, call.deadline))

    def _error_of(self, failed: frames.Failed, deadline: Deadline) -> LmdError:
        return error_of(failed, name=self.name, log=self._log_tail(), deadline=deadline)

    def _reply(self, request_id: int, frame: frames.RunnerFrame) -> None:
        if (call := self._calls.pop(request_id, None)) is not None:
            self.served += 1
            resolve(call.reply, frame)

    def _end_of(self, request_id: int) -> Answer | None:
        self.queue.discard(request_id)
        return self._answers.pop(request_id, None)

    def _cancel(self, request_id: int) -> None:
        if request_id in self._answers:
            self._link.send(frames.DaemonFrame(cancel=frames.Cancel(request_id=request_id)))
