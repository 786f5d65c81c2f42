"""Asks a model for what has one reply: makes it resident, hands the request to its runner, returns the reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from lmd.daemon.config import Config
from lmd.daemon.deadline import Deadline
from lmd.daemon.inference import AnswerableModel, ModelSource, resolved_model
from lmd.daemon.metrics import Metrics, ModelWork
from lmd.daemon.parameters import context_floor, effective, load_settings, usable_kv_type
from lmd.daemon.residency.residency import Residency
from lmd.runner.v1 import frames_pb2 as frames


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what that says of how.

    Attributes:
        name: the authenticated identity; the engine is shared fairly between callers.
        time_left_s: what the call may take, None for any time.
    """

    name: str = ""
    time_left_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a runner said, and how long it took: in all, and of that for the model to get ready."""

    frame: frames.RunnerFrame
    total_ns: int
    load_ns: int


class ModelCalls:
    """Calls of runners by the names of models. Cancelling a call takes it back from its runner."""

    def __init__(
        self, catalog: ModelSource, residency: Residency, config: Config, work: ModelWork | None = None
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._num_ctx = config.runtime.num_ctx
        self._min_ctx = config.runtime.min_ctx
        self._kv_type = config.runtime.kv_type
        self._work = work or Metrics().work

    async def call(
        self,
        asked: str | AnswerableModel,
        build: Callable[[AnswerableModel], frames.DaemonFrame],
        *,
        caller: Caller,
        parameters: Mapping[str, object] | None = None,
        keep_alive: timedelta | None = None,
    ) -> Reply:
        """Return the reply to what *build* makes for the model; it may raise to refuse the request.

        Raises:
            InvalidRef, ModelNotFound, InvalidRequest: the request cannot be served.
            DeadlineExceeded: its time is up.
            LmdError: as `Residency.enqueue`, and what loading and running end with.
        """
        arrived_ns = time.monotonic_ns()
        deadline = Deadline(caller.time_left_s)
        model = await resolved_model(self._catalog, asked)
        frame = build(model)
        settings = load_settings(
            effective(
                parameters or {},
                model.parameters,
                num_ctx=self._num_ctx,
                train_ctx=model.header.context_length,
                kv_type=usable_kv_type(model.header, self._kv_type),
            ),
            model.header,
            min_ctx=context_floor(parameters or {}, model.parameters, self._min_ctx),
        )
        with self._residency.enqueue(model, settings, keep_alive, caller=caller.name) as ticket:
            load_ns, queued_ns = 0, time.monotonic_ns()
            if not ticket.done:
                if not await ticket.wait(deadline.within(None)):
                    raise deadline.error()
                load_ns = time.monotonic_ns() - queued_ns
            reply = await ticket.runner.call(frame, deadline)
        total_ns = time.monotonic_ns() - arrived_ns
        operation = frame.WhichOneof("frame") or ""
        self._work.note_call(operation, total_ns=total_ns, load_ns=load_ns, embedded_tokens=sum(reply.embedded.tokens))
        return Reply(reply, total_ns, load_ns)
