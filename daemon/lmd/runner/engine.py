"""The engine loop: one thread that decodes for all requests at once and never waits for anything but work.

Every step decodes one token for each generating slot and a bounded share of the prompts that are waiting, in a single
batch. Between steps it reads frames, answers pings, takes and ends requests, and sends what is ready.
"""

from __future__ import annotations

import collections
import itertools
import select
import time

from lmd.runner.background import Background
from lmd.runner.channel import Channel
from lmd.runner.embedder import Embedder
from lmd.runner.failures import failure
from lmd.runner.job import Job, Request, plan_prefill
from lmd.runner.model import Model
from lmd.runner.prompts import Prepared, PromptMaker
from lmd.runner.sampling import check_sampling, make_sampler
from lmd.runner.side_requests import SideRequests
from lmd.runner.slots import Slots, common_prefix
from lmd.runner.text import TextStream
from lmd.runner.v1 import frames_pb2
from lmd.runner.wire import WireError

_STOP = frames_pb2.Finished.REASON_STOP
_LENGTH = frames_pb2.Finished.REASON_LENGTH

# While answers are being generated, prompts get this part of a step, so that no answer stalls for long.
_SHARED_PREFILL = 4
_SHARED_PREFILL_MINIMUM = 32

# A request waits for another one's prompt to be decoded when that saves it at least this many tokens.
_WORTH_WAITING = 32

# Tokens of texts that are embedded between two steps of answers.
_SHARED_EMBED_TOKENS = 128


class Engine:
    """Serves requests with one loaded model until the daemon drains it or is gone."""

    def __init__(self, model: Model, channel: Channel, prompts: PromptMaker) -> None:
        self._llama = model.llama
        self._model = model
        self._channel = channel
        self._prompts = prompts
        self._slots = Slots(model.memory, model.slots)
        self._queue: collections.deque[Request] = collections.deque()
        self._reading: list[Job] = []
        self._generating: list[Job] = []
        self._known: set[int] = set()
        self._order = itertools.count()
        self._draining = False
        self._background = Background()
        self._embedder = Embedder(model.embedding, self._background)
        self._side = SideRequests(model.vocab, self._background)
        self._poll = select.epoll()
        self._watched: tuple[dict[int, int], int] = ({}, 0)

    def run(self) -> None:
        """Serve; return when drained.

        Raises:
            WireClosed: the daemon is gone.
            WireError: it broke the protocol.
        """
        self._channel.flush()
        while not (self._draining and not self._known and not self._channel.has_unsent):
            self._wait(self._timeout_s())
            for message in self._channel.receive() if not self._channel.congested else ():
                self._handle(message)
            self._prepared(self._prompts.advance())
            self._serve_side_requests()
            self._admit()
            if self._reading or self._generating:
                # Reading a prompt can take a while; nothing is held back over that.
                self._channel.flush(now=bool(self._reading))
                self._step()
            self._channel.flush(now=not self._generating)

    def _wait(self, timeout_s: float) -> None:
        """Wait for a frame, a rendered prompt or room to write, up to *timeout_s* (negative: for ever)."""
        interest = {
            self._channel.fileno(): (0 if self._channel.congested else select.EPOLLIN)
            | (select.EPOLLOUT if self._channel.blocked else 0),
            self._prompts.wake_fileno: select.EPOLLIN,
            self._background.fileno(): select.EPOLLIN,
        }
        generation = 0
        templates = self._prompts.templates
        if templates is not None and (fileno := templates.fileno()) is not None:
            interest[fileno] = select.EPOLLIN | (select.EPOLLOUT if templates.has_unsent else 0)
            generation = templates.generation
        if (interest, generation) != self._watched:
            self._watched = (interest, generation)
            self._watch(interest)
        for fileno, _ in self._poll.poll(timeout_s):
            if fileno == self._prompts.wake_fileno:
                self._prompts.drain_wake()

    def _watch(self, interest: dict[int, int]) -> None:
        # A closed descriptor leaves epoll by itself, and its number may have come back; so all are set anew.
        self._poll.close()
        self._poll = select.epoll()
        for fileno, events in interest.items():
            self._poll.register(fileno, events)

    def _timeout_s(self) -> float:
        """Return how long there is nothing to do if nothing arrives; negative is for ever."""
        if self._reading or self._generating or self._embedder.ready:
            return 0.0
        if self._queue and not self._channel.congested:
            return 0.0
        templates = self._prompts.templates
        due = [self._embedder.deadline, None if templates is None else templates.deadline]
        deadline = min((at for at in due if at is not None), default=None)
        return -1.0 if deadline is None else max(0.0, deadline - time.monotonic())

    def _handle(self, message: frames_pb2.DaemonFrame) -> None:
        kind = message.WhichOneof("frame")
        if kind == "submit":
            self._submit(message.submit)
        elif kind == "cancel":
            self._cancel(message.cancel.request_id)
        elif kind == "ping":
            pong = frames_pb2.Pong(
                nonce=message.ping.nonce,
                slots_busy=self._slots.busy_count,
                queued=len(self._queue) + self._prompts.pending + self._embedder.pending,
            )
            self._channel.send(frames_pb2.RunnerFrame(pong=pong))
        elif kind == "drain":
            self._draining = True
        elif kind in ("embed", "tokenize", "detokenize", "render"):
            self._take_side_request(message)
        else:
            raise WireError(f"a frame of kind {kind} is not expected now")

    def _take_side_request(self, message: frames_pb2.DaemonFrame) -> None:
        kind = message.WhichOneof("frame")
        request_id: int = getattr(message, kind or "").request_id
        if request_id in self._known:
            raise WireError(f"request {request_id} exists already")
        self._known.add(request_id)
        if self._draining:
            self._fail(request_id, frames_pb2.Failed.KIND_CANCELLED, "the runner takes no more requests")
        elif kind == "embed":
            self._answer(self._embedder.submit(message.embed))
        elif kind == "render":
            if not self._prompts.render(request_id, message.render.chat):
                self._fail(request_id, frames_pb2.Failed.KIND_NO_TEMPLATE, "the model has no chat template")
        else:
            self._answer(self._side.handle(message))

    def _serve_side_requests(self) -> None:
        """Embed one batch, and answer what the background and the template are done with."""
        for rendered in self._prompts.take_rendered():
            if rendered.error:
                self._fail(rendered.request_id, frames_pb2.Failed.KIND_TEMPLATE, rendered.error)
            else:
                self._answer(self._side.rendered(rendered.request_id, rendered.prompt))
        self._answer(self._background.collect())
        answering = bool(self._reading or self._generating)
        self._answer(self._embedder.step(_SHARED_EMBED_TOKENS if answering else 0))

    def _answer(self, frames: list[frames_pb2.RunnerFrame]) -> None:
        for frame in frames:
            request_id: int = getattr(frame, frame.WhichOneof("frame") or "").request_id
            if request_id in self._known:  # otherwise it was taken back
                self._known.discard(request_id)
                self._channel.send(frame, last_of=request_id)

    def _submit(self, message: frames_pb2.Submit) -> None:
        request_id = message.request_id
        if request_id in self._known:
            raise WireError(f"request {request_id} exists already")
        self._known.add(request_id)
        request = Request(request_id, next(self._order), message.sampling, message.cache_scope)
        problem = check_sampling(message.sampling)
        if message.WhichOneof("input") is None:
            problem = "the request has no prompt"
        if self._draining:
            self._fail(request_id, frames_pb2.Failed.KIND_CANCELLED, "the runner takes no more requests")
        elif not self._model.generates:
            kind, embeds = frames_pb2.Failed.KIND_CAPABILITY, "the model only embeds"
            self._answer([failure(request_id, kind, embeds, field="completion")])
        elif problem:
            self._fail(request_id, frames_pb2.Failed.KIND_INVALID, problem)
        else:
            self._prepared(self._prompts.submit(request, message))

    def _prepared(self, outcomes: list[Prepared]) -> None:
        for outcome in outcomes:
            if outcome.failed is None:
                self._queue.append(outcome.request)
            else:
                self._send_failed(outcome.failed)

    def _cancel(self, request_id: int) -> None:
        if request_id not in self._known:
            return
        if not self._prompts.cancel(request_id) and not self._embedder.cancel(request_id):
            for request in self._queue:
                if request.request_id == request_id:
                    self._queue.remove(request)
                    break
            for job in self._jobs():
                if job.request.request_id == request_id:
                    self._release(job)
        self._fail(request_id, frames_pb2.Failed.KIND_CANCELLED, "the request was taken back")

    def _jobs(self) -> list[Job]:
        return self._reading + self._generating

    def _admit(self) -> None:
        """Give slots to the requests that wait longest."""
        if not self._queue or self._channel.congested:
            return
        for request in list(self._queue):
            if not self._slots.any_idle():
                return
            if not self._should_wait(request):
                self._queue.remove(request)
                self._start(request)

    def _should_wait(self, request: Request) -> bool:
        """Tell whether an older request is about to decode a prompt that begins like this one."""
        if not self._model.memory.shares_freely:
            return False
        ahead = max(
            (
                common_prefix(job.request.prompt, request.prompt, len(request.prompt) - 1)
                for job in self._reading
                if job.request.scope == request.scope and job.request.order < request.order
            ),
            default=0,
        )
        if ahead < _WORTH_WAITING:
            return False
        saves = ahead - self._slots.longest_prefix(request.prompt, request.scope)
        # Once it has waited, the last few tokens are worth waiting for as well.
        request.waits = saves >= (1 if request.waits else _WORTH_WAITING)
        return request.waits

    def _start(self, request: Request) -> None:
        slot = self._slots.take(request.prompt, request.scope)
        assert slot is not None, "a slot was idle"
        model, sampling = self._model, request.sampling
        room = model.num_ctx - len(request.prompt)
        job = Job(
            request,
            slot,
            make_sampler(
                self._llama,
                sampling,
                vocab_size=model.vocab.size,
                num_ctx=model.num_ctx,
                prompt=request.prompt,
            ),
            TextStream(sampling.stop),
            cached_tokens=len(slot.tokens),
            limit=room if sampling.num_predict < 0 else min(room, sampling.num_predict),
        )
        self._reading.append(job)
        started = frames_pb2.Started(
            request_id=request.request_id, prompt_tokens=len(request.prompt), cached_tokens=job.cached_tokens
        )
        self._channel.send(frames_pb2.RunnerFrame(started=started))

    def _step(self) -> None:
        """Decode once: the next token of every answer and some of the prompts."""
        batch = self._model.batch
        batch.clear()
        outputs: list[tuple[Job, int]] = []
        for job in self._generating:
            slot = job.slot
            assert job.next_token is not None, "a generating job has a token to decode"
            outputs.append((job, batch.add(job.next_token, len(slot.tokens), slot.sequence)))
        plan = plan_prefill(self._reading, self._prefill_budget()) if self._reading else []
        for job, count in plan:
            begin = len(job.slot.tokens)
            chunk = job.request.prompt[begin : begin + count]
            last = count == job.unread
            index = batch.add_chunk(chunk, begin, job.slot.sequence, sample=last)
            if last:
                outputs.append((job, index))
        if not self._decode():
            return
        for job in self._generating:
            assert job.next_token is not None, "a generating job has a token to decode"
            job.slot.tokens.append(job.next_token)
        for job, count in plan:
            begin = len(job.slot.tokens)
            job.slot.tokens.extend(job.request.prompt[begin : begin + count])
        for job, index in outputs:
            self._sample(job, index)

    def _prefill_budget(self) -> int:
        capacity = self._model.batch.capacity - len(self._generating)
        if not self._generating:
            return capacity
        return min(capacity, max(_SHARED_PREFILL_MINIMUM, self._model.batch.capacity // _SHARED_PREFILL))

    def _decode(self) -> bool:
        """Run the batch; on failure end all requests in it, since the engine does not say whose fault it was."""
        llama, context = self._llama, self._model.context
        native = self._model.batch.finish()
        code = llama.llama_decode(context, native)
        if code == 1 and self._slots.forget_idle():
            # No room for the batch: what is kept only as prefix cache gives way.
            code = llama.llama_decode(context, native)
        if code == 0:
            return True
        for job in self._jobs():
            self._release(job)
            self._slots.forget(job.slot)
            self._fail(
                job.request.request_id, frames_pb2.Failed.KIND_ENGINE, f"the engine failed to decode (code {code})"
            )
        return False

    def _sample(self, job: Job, index: int) -> None:
        """Choose the next token of a job and act on it."""
        if job.next_token is None:
            if job.limit == 0:
                job.first_token_ns = time.monotonic_ns()
                self._finish(job, _LENGTH)
                return
            self._reading.remove(job)
            self._generating.append(job)
        token: int = self._llama.llama_sampler_sample(job.sampler, self._model.context, index)
        if not job.first_token_ns:
            job.first_token_ns = time.monotonic_ns()
        job.next_token = token
        piece = self._model.vocab.piece(token)
        if piece is None:
            self._finish(job, _STOP)
            return
        job.generated_tokens += 1
        text = job.text.feed(piece)
        if text:
            self._channel.send_text(job.request.request_id, text, job.generated_tokens)
        if job.text.stop:
            self._finish(job, _STOP)
        elif job.generated_tokens >= job.limit:
            self._finish(job, _LENGTH)

    def _finish(self, job: Job, reason: frames_pb2.Finished.Reason.ValueType) -> None:
        request_id = job.request.request_id
        tail = job.text.finish(cut=reason == _LENGTH)
        if tail:
            self._channel.send_text(request_id, tail, job.generated_tokens)
        if job.text.stop:
            reason = _STOP
        self._release(job)
        self._known.discard(request_id)
        finished = frames_pb2.RunnerFrame(finished=job.finished(reason))
        self._channel.send(finished, last_of=request_id)

    def _release(self, job: Job) -> None:
        """Take a job off the engine; what its slot holds stays for others."""
        (self._reading if job in self._reading else self._generating).remove(job)
        self._llama.llama_sampler_free(job.sampler)
        self._slots.release(job.slot)

    def _fail(self, request_id: int, kind: frames_pb2.Failed.Kind.ValueType, message: str) -> None:
        self._send_failed(frames_pb2.Failed(request_id=request_id, kind=kind, message=message))

    def _send_failed(self, failed: frames_pb2.Failed) -> None:
        self._known.discard(failed.request_id)
        self._channel.send(frames_pb2.RunnerFrame(failed=failed), last_of=failed.request_id)
