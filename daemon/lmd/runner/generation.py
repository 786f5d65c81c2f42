"""The heart of the engine: requests get slots, steps decode for all of them at once, answers come out token by token.

A step decodes one token for every answer that is being generated and a bounded share of the prompts that are being
read, in one batch; or, where that is faster, steps do the one and the other in turns. Requests that ask for it are
decoded in batches of their own.

What holds between steps:

- a job is either reading (its slot holds less than its target) or generating (it has a next token, and its slot holds
  all of its target); it has its slot to itself;
- what `Slot.tokens` says is what the memory holds of the slot's sequence;
- a request has as many places and jobs and ends, together, as choices; when all are ends it is finished, once.

No frames, no clock but for timings, no llama.cpp: `Outbox` takes what comes out, `Backend` decodes.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from lmd.runner.answer_parser import Part
from lmd.runner.format_error import FormatError
from lmd.runner.job import LENGTH, STOP, TOOL_CALLS, Job, Place, Request
from lmd.runner.prefill_pace import PrefillPace
from lmd.runner.saved_prefixes import SavedPrefixes
from lmd.runner.scheduler import FairQueue, plan_prefill
from lmd.runner.seams import DONE, NO_ROOM, Backend
from lmd.runner.slots import Slots
from lmd.runner.speculation import DraftSource, Speculation, accepted, make_speculation
from lmd.runner.v1 import frames_pb2

Failed = frames_pb2.Failed

# A request waits for another one's prompt to be decoded when that saves it at least this many tokens.
_WORTH_WAITING = 32

# An answer that may shift its context and has no limit of its own ends after so many contexts.
_SHIFTED_CONTEXTS = 10

_SEEDS = 2**32 - 1

# Stands for the end of an answer that is complete in its format, whether or not the model has a token for that.
_END = -1


class Pieces(Protocol):
    """What the engine needs of a vocabulary."""

    size: int

    def piece(self, token: int) -> bytes | None:
        """Return the bytes that a token adds to the output; None for one that ends it."""


class Outbox(Protocol):
    """Takes what requests are told."""

    def started(self, request: Request) -> None:
        """Receive that the first answer of a request got a slot."""

    def text(
        self,
        request: Request,
        number: int,
        text: str | Sequence[Part],
        generated_tokens: int,
        logprobs: Sequence[frames_pb2.TokenLogprob],
    ) -> None:
        """Receive text (of an answer that is taken apart, its parts), or log probabilities, or both."""

    def finished(self, request: Request) -> None:
        """Receive the end."""

    def failed(self, request: Request, kind: Failed.Kind.ValueType, message: str, field: str = "") -> None:
        """Receive the failure."""


class Generation:
    """Requests that have their prompts, until they are answered. Not thread-safe."""

    def __init__(
        self,
        backend: Backend,
        vocab: Pieces,
        outbox: Outbox,
        *,
        logprobs: Callable[[int, int, int], frames_pb2.TokenLogprob],
        draft_model: DraftSource | None = None,
        budget_tokens: int | None = None,
        saved: SavedPrefixes | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Serve with *backend*.

        *logprobs* makes the report on a token, from the address of its row's scores, its id, and how many
        alternatives to name. *draft_model* guesses for requests that do not object. *budget_tokens* bounds the prefix
        cache; by default only the memory does. *saved* is what former runners have left.
        """
        self._backend = backend
        self._vocab = vocab
        self._outbox = outbox
        self._logprobs = logprobs
        self._draft_model = draft_model
        self.slots = Slots(
            backend.memory,
            backend.slots,
            sequences=backend.sequences,
            budget_tokens=backend.cells if budget_tokens is None else budget_tokens,
            saved=saved,
            states=backend.states,
            parked_bytes=backend.parked_bytes,
            idle_tokens=backend.idle_tokens,
            idle_rows=backend.idle_rows,
        )
        self._queue = FairQueue()
        self._reading: list[Job] = []
        self._generating: list[Job] = []
        self._clock = clock
        self._pace = PrefillPace(backend.batch.capacity)
        self._has_read = False
        self._totals = frames_pb2.Stats(kv_size=backend.cells)

    @property
    def is_busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._reading or self._generating)

    @property
    def is_reading(self) -> bool:
        """Whether the next step decodes prompts."""
        return bool(self._reading)

    @property
    def queued(self) -> int:
        """Places that wait for a slot."""
        return len(self._queue)

    def stats(self) -> frames_pb2.Stats:
        """Return what was done so far and what is held."""
        self._totals.prefixes = self.slots.cached_count
        self._totals.parked_bytes = self.slots.parked_bytes
        self._totals.kv_used = min(self.slots.used_tokens, self._backend.cells)
        return self._totals

    def waiting(self, now_ns: int) -> list[int]:
        """Return the ids of the requests of which nothing has started, in the order of service."""
        ids = (place.request.request_id for place in self._queue.order(now_ns) if not place.request.started_ns)
        return list(dict.fromkeys(ids))

    def submit(self, request: Request) -> None:
        """Queue a request that has its prompt."""
        for number in range(request.choices):
            self._queue.push(Place(request, number))

    def cancel(self, request: Request) -> None:
        """Take a request out, whatever it does now; nothing more is said about it."""
        self._queue.drop(request)
        for job in [job for job in self._jobs() if job.request is request]:
            self._release(job)

    def admit(self, now_ns: int) -> None:
        """Give idle slots to those whose turn it is."""
        if not self._queue or not self.slots.any_idle():
            return
        for place in self._queue.order(now_ns):
            if not self.slots.any_idle():
                return
            if not self._should_wait(place):
                self._start(place)

    def step(self) -> None:
        """Decode once for all jobs, and once for each that is to be alone."""
        unread = sum(job.unread for job in self._reading)
        self.slots.clear_the_way(len(self._generating) + min(unread, self._backend.batch.capacity))
        for job in [job for job in self._jobs() if job.request.alone]:
            if job in self._reading:
                self._decode_step([], [(job, min(job.unread, self._backend.batch.capacity))])
            elif job in self._generating and self._has_room(job):
                self._decode_step([job], [])
        generating = [job for job in self._generating if not job.request.alone and self._has_room(job)]
        reading = [job for job in self._reading if not job.request.alone]
        budget = self._pace.budget(len(reading), len(generating))
        if generating and reading and not self._backend.mixes:
            self._has_read = not self._has_read
            generating, reading = ([], reading) if self._has_read else (generating, [])
        # All of a batch has the same adapters.
        sets = dict.fromkeys(job.request.adapters for job in (*generating, *reading))
        for adapters in sets:
            some = [job for job in generating if job.request.adapters == adapters]
            room = min(max(1, budget // len(sets)), self._backend.batch.capacity - len(some))
            self._decode_step(some, plan_prefill([job for job in reading if job.request.adapters == adapters], room))

    def _jobs(self) -> list[Job]:
        return self._reading + self._generating

    def _should_wait(self, place: Place) -> bool:
        """Tell whether a prompt that begins like this one is being decoded by an older place."""
        request = place.request
        if not self._backend.memory.shares_freely or request.alone:
            return False
        ahead = max(
            (
                self.slots.shareable(request.prompt, request.scope, job.target, job.slot.scope)
                for job in self._reading
                if (job.request.order, job.number) < (request.order, place.number) and not job.request.alone
            ),
            default=0,
        )
        # Once it has waited, the last few tokens are worth waiting for as well.
        needed = 1 if place.waits else _WORTH_WAITING
        place.waits = ahead >= needed and ahead - self.slots.longest_prefix(request.prompt, request.scope) >= needed
        return place.waits

    def _start(self, place: Place) -> None:
        request = place.request
        sampling = request.message.sampling
        slot = self.slots.take(request.prompt, request.scope, reuse=not request.alone)
        assert slot is not None, "a slot was idle"
        self._queue.start(place)
        room = self._backend.num_ctx - len(request.prompt)
        if request.shifts:
            room = _SHIFTED_CONTEXTS * self._backend.num_ctx
        job = Job(
            request,
            place.number,
            slot,
            self._backend.sampler(sampling, request.prompt, seed=(sampling.seed + place.number) % _SEEDS),
            request.stream(),
            limit=room if sampling.num_predict < 0 else min(room, sampling.num_predict),
            target=request.prompt,
            constraint=request.constraint.copy() if request.constraint is not None else None,
            speculation=self._speculation(request),
        )
        self._reading.append(job)
        if not request.started_ns:
            request.started_ns = job.started_ns
            request.cached_tokens = slot.cached
            self._totals.prompt_tokens += len(request.prompt)
            self._totals.cached_tokens += slot.cached
            self._totals.cache_hits += bool(slot.cached)
            self._totals.cache_misses += not slot.cached
            self._outbox.started(request)

    def _speculation(self, request: Request) -> Speculation | None:
        """Return what drafts for a request.

        Nothing does where wrong guesses could not be cut off again, nor for a request that must repeat exactly: what a
        draft model remembers of earlier turns changes the sizes of batches.
        """
        if not self._backend.memory.shares_freely or request.alone:
            return None
        sampling = request.message.sampling
        return make_speculation(
            draft_num_predict=sampling.draft_num_predict,
            prompt_lookup=sampling.prompt_lookup,
            model=self._draft_model,
            scope=request.scope,
            vocab_size=self._vocab.size,
        )

    def _has_room(self, job: Job) -> bool:
        """Make room for the next token of an answer; false when it has to read its shortened context anew first."""
        length = len(job.slot.tokens)
        if length < self._backend.num_ctx:
            return True
        slot = job.slot
        keep = min(max(1, len(self.slots.manifest)), length // 4)
        discard = (length - keep) // 2
        job.request.shifted_tokens += discard
        if self._backend.memory.can_shift and slot.shared_to <= keep + discard:
            if self._backend.memory.shift(slot.sequence, keep, discard):
                slot.tokens = slot.tokens[:keep] + slot.tokens[keep + discard :]
                slot.shared_to, slot.faithful = min(slot.shared_to, keep), False
                return True
            slot.tokens = array("i")
            job.target = job.target[:keep] + job.target[keep + discard :]
        else:
            job.target = slot.tokens[:keep] + slot.tokens[keep + discard :]
            kept = slot.faithful and self._backend.memory.keep(slot.sequence, keep)
            if not kept:
                self._backend.memory.clear(slot.sequence)
            slot.tokens = slot.tokens[:keep] if kept else array("i")
            slot.shared_to = min(slot.shared_to, len(slot.tokens))
        assert job.next_token is not None, "a generating job has a token to decode"
        job.target = job.target + array("i", [job.next_token])
        job.next_token = None
        slot.cached, slot.faithful = 0, True
        self._generating.remove(job)
        self._reading.append(job)
        return False

    def _decode_step(self, generating: Sequence[Job], plan: Sequence[tuple[Job, int]]) -> None:
        """Decode the next token of some answers and parts of some prompts, and act on what comes out."""
        batch = self._backend.batch
        batch.clear()
        outputs: list[tuple[Job, int, list[int]]] = []
        rows_left = self._backend.rows - len(generating) - len(plan)
        tokens_left = batch.capacity - len(generating) - sum(count for _, count in plan)
        for job in generating:
            assert job.next_token is not None, "a generating job has a token to decode"
            begin = len(job.slot.tokens)
            row = batch.add(job.next_token, begin, job.slot.sequence)
            drafted = self._draft(job, active=len(generating) + len(plan), most=min(rows_left, tokens_left))
            for place, token in enumerate(drafted, begin + 1):
                batch.add(token, place, job.slot.sequence)
            rows_left, tokens_left = rows_left - len(drafted), tokens_left - len(drafted)
            outputs.append((job, row, drafted))
        for job, count in plan:
            begin = len(job.slot.tokens)
            last = count == job.unread
            row = batch.add_chunk(job.target[begin : begin + count], begin, job.slot.sequence, sample=last)
            if last:
                outputs.append((job, row, []))
        self._backend.adapt((generating[0] if generating else plan[0][0]).request.adapters)
        began = self._clock()
        if not self._decode([*generating, *(job for job, _ in plan)]):
            return
        self._pace.note(sum(count for _, count in plan), self._clock() - began)
        for job in generating:
            assert job.next_token is not None, "a generating job has a token to decode"
            job.slot.tokens.append(job.next_token)
            job.target = job.slot.tokens
            self._queue.charge(job.request.caller, 1)
        for job, count in plan:
            begin = len(job.slot.tokens)
            job.slot.tokens.extend(job.target[begin : begin + count])
            self._queue.charge(job.request.caller, count)
            if not job.unread and not job.first_token_ns:
                self.slots.pin_manifest(job.slot)
        for job, row, drafted in outputs:
            self._sample(job, row, drafted)

    def _draft(self, job: Job, *, active: int, most: int) -> list[int]:
        """Guess what follows the next token of an answer, at most *most* tokens."""
        if job.speculation is None:
            return []
        tokens = job.slot.tokens
        assert job.next_token is not None, "a generating job has a token to decode"
        room = min(most, self._backend.num_ctx - len(tokens) - 1, job.limit - job.generated_tokens - 1)
        tokens.append(job.next_token)
        try:
            return job.speculation.draft(tokens, active=active, room=max(0, room))
        finally:
            tokens.pop()

    def _decode(self, jobs: Sequence[Job]) -> bool:
        """Run the batch; on failure end all requests in it, since the engine does not say whose fault it was."""
        code = self._backend.decode()
        while code == NO_ROOM and self.slots.make_room():
            code = self._backend.decode()
        if code == DONE:
            return True
        for job in jobs:
            self.slots.forget(job.slot)
        for request in dict.fromkeys(job.request for job in jobs):
            self._fail(request, f"the engine failed to decode (code {code})")
        return False

    def _sample(self, job: Job, row: int, drafted: Sequence[int]) -> None:
        """Choose the next token of a job, and further ones as long as they are those that were drafted."""
        if job not in self._jobs():
            # Another answer of the same request has failed it, earlier in this step.
            return
        if job.next_token is None:
            self._reading.remove(job)
            self._generating.append(job)
        if not job.first_token_ns:
            job.first_token_ns = time.monotonic_ns()
        if job.limit == 0:
            self._finish(job, LENGTH)
            return
        chosen: list[tuple[int, list[frames_pb2.TokenLogprob]]] = []
        for place in range(len(drafted) + 1):
            try:
                token, reports = self._choose(job, row + place)
            except FormatError as error:
                self.cancel(job.request)
                self._outbox.failed(job.request, Failed.KIND_INVALID, str(error), "format")
                return
            chosen.append((token, reports))
            if place == len(drafted) or token != drafted[place] or self._ends(job, token):
                break
        if not self._keep_accepted(job, drafted, accepted(drafted, [token for token, _ in chosen])):
            self._fail(job.request, "the engine did not take back what was drafted")
            return
        for token, reports in chosen[:-1]:
            if not self._say(job, token, reports):
                return
        # The format has followed all of them; only after the last can it be told whether anything may come.
        token, reports = chosen[-1]
        self._say(job, token, reports, complete=job.constraint is not None and job.constraint.complete)

    def _keep_accepted(self, job: Job, drafted: Sequence[int], count: int) -> bool:
        """Make memory and slot hold the first *count* drafted tokens, which were right, and no other."""
        slot = job.slot
        slot.tokens.extend(drafted[:count])
        self._queue.charge(job.request.caller, count)
        if job.speculation is not None:
            job.speculation.note(len(drafted), count)
        if count == len(drafted) or self._backend.memory.keep(slot.sequence, len(slot.tokens)):
            return True
        self.slots.forget(slot)
        return False

    def _ends(self, job: Job, token: int) -> bool:
        """Tell whether an answer ends with a token, which is then not a part of it, or must end after it."""
        return self._is_end(job, token) or (job.constraint is not None and job.constraint.complete)

    def _is_end(self, job: Job, token: int) -> bool:
        return token == _END or self._vocab.piece(token) is None or token in job.request.message.sampling.stop_tokens

    def _say(self, job: Job, token: int, reports: list[frames_pb2.TokenLogprob], *, complete: bool = False) -> bool:
        """Add a token to an answer; return whether it goes on."""
        job.next_token = token
        piece = None if self._is_end(job, token) else self._vocab.piece(token)
        if piece is None:
            self._finish(job, STOP)
            return False
        if not piece:
            piece = job.request.markers.get(token, piece)
        job.generated_tokens += 1
        self._totals.generated_tokens += 1
        text = job.text.feed(piece)
        if text or reports:
            self._outbox.text(job.request, job.number, text, job.generated_tokens, reports)
        if job.text.stop or complete:
            self._finish(job, STOP)
        elif job.generated_tokens >= job.limit:
            self._finish(job, LENGTH)
        else:
            return True
        return False

    def _fail(self, request: Request, message: str) -> None:
        self.cancel(request)
        self._outbox.failed(request, Failed.KIND_ENGINE, message)

    def _choose(self, job: Job, row: int) -> tuple[int, list[frames_pb2.TokenLogprob]]:
        """Return a token with what is to be reported of it.

        Raises:
            FormatError: nothing that the model can say fits the format, or that has become too complex.
        """
        message, constraint = job.request.message, job.constraint
        reports = message.HasField("top_logprobs")
        # A sampler leaves the scores as they were, a mask does not.
        raw = _RawScores(self._backend.logits(row), self._vocab.size) if reports and constraint is not None else None
        if constraint is not None:
            constraint.mask(self._backend.logits(row), self._vocab.size)
            if constraint.complete:
                return _END, []
        token = job.sampler.sample(row)
        if constraint is not None and not constraint.accept(token):
            raise FormatError("the model has no token with which the answer could go on in this format")
        if not reports or self._is_end(job, token):
            return token, []
        address = raw.address if raw is not None else self._backend.logits(row)
        return token, [self._logprobs(address, token, message.top_logprobs)]

    def _finish(self, job: Job, reason: frames_pb2.Finished.Reason.ValueType) -> None:
        tail = job.text.finish(cut=reason == LENGTH)
        request = job.request
        if tail:
            self._outbox.text(request, job.number, tail, job.generated_tokens, ())
        self._release(job)
        if job.text.stop or reason == STOP:
            reason = TOOL_CALLS if job.text.called else STOP
        request.ends[job.number] = job.finished(reason)
        if len(request.ends) == request.choices:
            self._outbox.finished(request)

    def _release(self, job: Job) -> None:
        """Take a job off the engine; what its slot holds stays for others."""
        (self._reading if job in self._reading else self._generating).remove(job)
        job.sampler.free()
        if (speculation := job.speculation) is not None:
            speculation.forget()
            job.request.drafted_tokens += speculation.drafted_tokens
            job.request.accepted_tokens += speculation.accepted_tokens
            self._totals.drafted_tokens += speculation.drafted_tokens
            self._totals.accepted_tokens += speculation.accepted_tokens
        self.slots.release(job.slot)
        self._queue.end(job.request.caller)


class _RawScores:
    """A copy of a row's scores: what comes after may forbid tokens in place."""

    def __init__(self, address: int, count: int) -> None:
        self._copy = (ctypes.c_float * count).from_buffer_copy((ctypes.c_float * count).from_address(address))
        self.address = ctypes.addressof(self._copy)
