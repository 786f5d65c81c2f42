"""The engine loop: one thread that decodes for all requests at once and never waits for anything but work.

Between steps it reads frames, answers pings, takes and ends requests, and sends what is ready.
"""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Sequence

from lmd.runner.adapters import UnknownAdapter
from lmd.runner.answer_parser import Part
from lmd.runner.backend import LlamaBackend
from lmd.runner.background import Background
from lmd.runner.channel import Channel
from lmd.runner.constraints import Refusal, make_constraint, needs_constraint
from lmd.runner.embedder import Embedder
from lmd.runner.failures import failure
from lmd.runner.formats import Formats
from lmd.runner.generation import Generation
from lmd.runner.job import Constraint, Request
from lmd.runner.model import Model
from lmd.runner.prompts import Prepared, PromptMaker
from lmd.runner.reading import Readings
from lmd.runner.reports import token_report
from lmd.runner.sampling import Problem, find_problem
from lmd.runner.saved_prefixes import SavedPrefixes
from lmd.runner.side_requests import SideRequests
from lmd.runner.speculation import DraftSource
from lmd.runner.v1 import frames_pb2
from lmd.runner.wire import WireError

Failed = frames_pb2.Failed

# How often those who wait are told where they stand, at most.
_QUEUE_INTERVAL_S = 0.2

# Tokens of texts that are embedded between two steps of answers.
_SHARED_EMBED_TOKENS = 128


class Engine:
    """Serves requests with one loaded model until the daemon drains it or is gone."""

    def __init__(
        self,
        model: Model,
        channel: Channel,
        prompts: PromptMaker,
        background: Background,
        *,
        draft_model: DraftSource | None = None,
        saved: SavedPrefixes | None = None,
    ) -> None:
        self._channel = channel
        self._save_s = 0.0
        self._prompts = prompts
        self._vocab_size = model.vocab.size
        self._generates = model.generates
        self._adapters = model.adapters
        self._generation = Generation(
            LlamaBackend(model),
            model.vocab,
            self,
            logprobs=lambda address, token, top: token_report(model.vocab, address, token, top),
            draft_model=draft_model,
            saved=saved,
        )
        self._background = background
        self._embedder = Embedder(model.embedding, self._background, self._look_while_embedding)
        self._side = SideRequests(model.vocab, self._background)
        self._formats = Formats(model.llama, model.vocab)
        self._readings = Readings(model.vocab, model.template)
        self._tool_template = model.tool_template
        self._requests: dict[int, Request] = {}
        self._side_ids: set[int] = set()
        #: Frames that came while a batch was embedded.
        self._postponed: list[frames_pb2.DaemonFrame] = []
        self._order = itertools.count()
        self._draining = False
        self._poll = select.epoll()
        self._watched: tuple[dict[int, int], list[tuple[int, int]]] = ({}, [])
        self._queue_told: list[int] = []
        self._queue_told_at = 0.0

    def run(self) -> None:
        """Serve; return when drained.

        Raises:
            WireClosed: the daemon is gone.
            WireError: it broke the protocol.
        """
        self._channel.flush()
        while not (self._draining and not self._requests and not self._side_ids and not self._channel.has_unsent):
            self._wait(self._timeout_s())
            postponed, self._postponed = self._postponed, []
            for message in (*postponed, *self._receive()):
                self._handle(message)
            self._answer(self._background.collect())
            self._prepared(self._prompts.advance())
            self._end_expired()
            self._serve_side_requests()
            if not self._channel.congested:
                self._generation.admit(time.monotonic_ns())
            self._tell_queue()
            if self._generation.is_busy:
                # Reading a prompt can take a while; nothing is held back over that.
                self._channel.flush(now=self._generation.is_reading)
                self._generation.step()
            self._channel.flush(now=not self._generation.is_busy)
        if self._save_s > 0:
            self._generation.slots.save(self._save_s)

    # What requests are told: see `Outbox`.

    def started(self, request: Request) -> None:
        """Send that a request got a slot."""
        started = frames_pb2.Started(
            request_id=request.request_id, prompt_tokens=len(request.prompt), cached_tokens=request.cached_tokens
        )
        self._channel.send(frames_pb2.RunnerFrame(started=started))

    def text(
        self,
        request: Request,
        number: int,
        text: str | Sequence[Part],
        generated_tokens: int,
        logprobs: Sequence[frames_pb2.TokenLogprob],
    ) -> None:
        """Send text."""
        self._channel.send_text(request.request_id, number, text, generated_tokens, logprobs)

    def finished(self, request: Request) -> None:
        """Send the end."""
        del self._requests[request.request_id]
        self._channel.send(frames_pb2.RunnerFrame(finished=request.finished()), last_of=request.request_id)

    def failed(self, request: Request, kind: Failed.Kind.ValueType, message: str, field: str = "") -> None:
        """Send a failure."""
        self._send_failed(failure(request.request_id, kind, message, field=field).failed)

    # The loop's parts.

    def _wait(self, timeout_s: float) -> None:
        """Wait for a frame, a rendered prompt or room to write, up to *timeout_s* (negative: for ever)."""
        interest = {
            self._channel.fileno(): (0 if self._channel.congested else select.EPOLLIN)
            | (select.EPOLLOUT if self._channel.blocked else 0),
            self._background.fileno(): select.EPOLLIN,
        }
        generations: list[tuple[int, int]] = []
        for number, templates in enumerate(self._prompts.clients):
            if (fileno := templates.fileno()) is not None:
                interest[fileno] = select.EPOLLIN | (select.EPOLLOUT if templates.has_unsent else 0)
                generations.append((number, templates.generation))
        if (interest, generations) != self._watched:
            self._watched = (interest, generations)
            self._watch(interest)
        self._poll.poll(timeout_s)

    def _watch(self, interest: dict[int, int]) -> None:
        # A closed descriptor leaves epoll by itself, and its number may have come back; so all are set anew.
        self._poll.close()
        self._poll = select.epoll()
        for fileno, events in interest.items():
            self._poll.register(fileno, events)

    def _receive(self) -> list[frames_pb2.DaemonFrame]:
        return self._channel.receive() if not self._channel.congested else []

    def _look_while_embedding(self) -> set[int]:
        """Answer pings, since a long text takes a while; return which requests the other frames, for later, cancel."""
        for message in self._receive():
            if message.WhichOneof("frame") == "ping":
                self._handle(message)
            else:
                self._postponed.append(message)
        self._channel.flush()
        return {message.cancel.request_id for message in self._postponed if message.WhichOneof("frame") == "cancel"}

    def _timeout_s(self) -> float:
        """Return how long there is nothing to do if nothing arrives; negative is for ever."""
        if self._generation.is_busy or self._embedder.ready or self._postponed:
            return 0.0
        if self._generation.queued and not self._channel.congested:
            return 0.0
        now = time.monotonic()
        due = [request.deadline_ns / 1e9 for request in self._requests.values() if request.deadline_ns is not None]
        due += [client.deadline for client in self._prompts.clients if client.deadline is not None]
        if self._embedder.deadline is not None:
            due.append(self._embedder.deadline)
        return max(0.0, min(due) - now) if due else -1.0

    def _handle(self, message: frames_pb2.DaemonFrame) -> None:
        kind = message.WhichOneof("frame")
        if kind == "submit":
            self._submit(message.submit)
        elif kind == "cancel":
            self._end(message.cancel.request_id, Failed.KIND_CANCELLED, "the request was taken back")
        elif kind == "ping":
            pong = frames_pb2.Pong(
                nonce=message.ping.nonce,
                slots_busy=self._generation.slots.busy_count,
                queued=self._generation.queued + self._prompts.pending + self._embedder.pending,
                stats=self._generation.stats(),
            )
            self._channel.send(frames_pb2.RunnerFrame(pong=pong))
        elif kind == "drain":
            self._draining = True
            self._save_s = message.drain.save_ms / 1000
        elif kind in ("embed", "tokenize", "detokenize", "render"):
            self._take_side_request(message)
        else:
            raise WireError(f"a frame of kind {kind} is not expected now")

    def _take_side_request(self, message: frames_pb2.DaemonFrame) -> None:
        kind = message.WhichOneof("frame")
        request_id: int = getattr(message, kind or "").request_id
        self._check_new(request_id)
        self._side_ids.add(request_id)
        if self._draining:
            self._fail_side(request_id, Failed.KIND_CANCELLED, "the runner takes no more requests")
        elif kind == "embed":
            self._answer(self._embedder.submit(message.embed))
        elif kind == "render":
            self._choose_template(message.render.chat)
            if not self._prompts.render(request_id, message.render.chat):
                self._fail_side(request_id, Failed.KIND_NO_TEMPLATE, "the model has no chat template")
        else:
            self._answer(self._side.handle(message))

    def _serve_side_requests(self) -> None:
        """Embed one batch, and answer what the template is done with."""
        for rendered in self._prompts.take_rendered():
            if rendered.error:
                self._fail_side(rendered.request_id, Failed.KIND_TEMPLATE, rendered.error)
            else:
                self._answer(self._side.rendered(rendered.request_id, rendered.prompt))
        self._answer(self._embedder.step(_SHARED_EMBED_TOKENS if self._generation.is_busy else 0))

    def _answer(self, frames: Sequence[frames_pb2.RunnerFrame]) -> None:
        for frame in frames:
            request_id: int = getattr(frame, frame.WhichOneof("frame") or "").request_id
            if request_id in self._side_ids:  # otherwise it was taken back
                self._side_ids.discard(request_id)
                self._channel.send(frame, last_of=request_id)

    def _fail_side(self, request_id: int, kind: Failed.Kind.ValueType, message: str) -> None:
        self._answer([failure(request_id, kind, message)])

    def _check_new(self, request_id: int) -> None:
        if request_id in self._requests or request_id in self._side_ids:
            raise WireError(f"request {request_id} exists already")

    def _submit(self, message: frames_pb2.Submit) -> None:
        request_id = message.request_id
        self._check_new(request_id)
        request = self._requests[request_id] = Request(message, next(self._order))
        if message.HasField("chat"):
            self._choose_template(message.chat)
            request.reading = self._readings.of(message.chat)
        problem = find_problem(message.sampling, self._vocab_size)
        try:
            request.adapters = self._adapters.asked(message.adapters)
        except UnknownAdapter as error:
            problem = Problem("adapters", str(error))
        if message.WhichOneof("input") is None:
            problem = Problem("prompt", "the request has no prompt")
        if any(not 0 <= token < self._vocab_size for token in message.tokens.ids):
            problem = Problem("tokens", f"a token is not one of the model's, which are 0 to {self._vocab_size - 1}")
        if self._draining:
            self.failed(request, Failed.KIND_CANCELLED, "the runner takes no more requests")
        elif not self._generates:
            self.failed(request, Failed.KIND_CAPABILITY, "the model only embeds", "completion")
        elif problem is not None:
            self.failed(request, Failed.KIND_INVALID, problem.message, problem.field)
        else:
            self._prepared(self._prompts.submit(request))

    def _choose_template(self, chat: frames_pb2.Chat) -> None:
        """Have a chat with functions rendered by the template that the model has for those, if it has one."""
        if chat.tools and chat.tool_choice != frames_pb2.TOOL_CHOICE_NONE and not chat.template:
            chat.template = self._tool_template

    def _prepared(self, outcomes: list[Prepared]) -> None:
        if self._prompts.manifest and not self._generation.slots.manifest:
            self._generation.slots.manifest = self._prompts.manifest
        for outcome in outcomes:
            if outcome.failed is not None:
                self._send_failed(outcome.failed)
            elif needs_constraint(outcome.request.message):
                self._constrain(outcome.request)
            else:
                self._generation.submit(outcome.request)

    def _constrain(self, request: Request) -> None:
        """Have made in the background what the answers are held to."""
        self._background.run(
            lambda: make_constraint(self._formats, request), lambda made: self._constrained(request, made)
        )

    def _constrained(self, request: Request, made: Constraint | Refusal) -> list[frames_pb2.RunnerFrame]:
        """Go on with a request, unless it was taken back meanwhile."""
        if self._requests.get(request.request_id) is request:
            if isinstance(made, Refusal):
                self.failed(request, Failed.KIND_INVALID, made.message, made.field)
            else:
                request.constraint = made
                self._generation.submit(request)
        return []

    def _end_expired(self) -> None:
        now_ns = time.monotonic_ns()
        for request in list(self._requests.values()):
            if request.deadline_ns is not None and now_ns >= request.deadline_ns:
                seconds = request.message.timeout_ms / 1000
                self._end(request.request_id, Failed.KIND_DEADLINE, f"it took longer than {seconds:g} s")

    def _end(self, request_id: int, kind: Failed.Kind.ValueType, message: str) -> None:
        """End a request wherever it is; one that has ended already is no error."""
        if request_id in self._side_ids:
            if not self._embedder.cancel(request_id):
                self._prompts.cancel(request_id)
            self._fail_side(request_id, kind, message)
            return
        request = self._requests.get(request_id)
        if request is None:
            return
        if not self._prompts.cancel(request_id):
            self._generation.cancel(request)
        self.failed(request, kind, message)

    def _tell_queue(self) -> None:
        """Send who waits, when that has changed."""
        if not self._generation.queued and not self._queue_told:
            return
        now = time.monotonic()
        if self._generation.queued and now - self._queue_told_at < _QUEUE_INTERVAL_S:
            return
        waiting = self._generation.waiting(time.monotonic_ns())
        self._queue_told_at = now
        if waiting != self._queue_told:
            self._queue_told = waiting
            self._channel.send(frames_pb2.RunnerFrame(queue=frames_pb2.Queue(request_ids=waiting)))

    def _send_failed(self, failed: frames_pb2.Failed) -> None:
        self._requests.pop(failed.request_id, None)
        self._channel.send(frames_pb2.RunnerFrame(failed=failed), last_of=failed.request_id)
