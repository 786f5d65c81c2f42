"""Serves requests for embeddings and for ranks, one batch a step, beside the engine that generates."""

from __future__ import annotations

import collections
import math
import time
from array import array
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

from lmd.runner.background import INLINE_BYTES, Background, Frames
from lmd.runner.embed_texts import TextError
from lmd.runner.embedding_context import INTERRUPTED, ContextError, EmbeddingContext, Pooling
from lmd.runner.embedding_model import EmbeddingModel
from lmd.runner.failures import failure, too_long
from lmd.runner.v1 import frames_pb2

_Kind = frames_pb2.Failed
# A frame may have 64 MiB; some of that is for the lengths of vectors and for what stands around them.
_MAX_VECTORS_BYTES = 60 << 20
_FLOAT_BYTES = 4


@dataclass(slots=True, eq=False)
class _Request:
    """A request, from its arrival to its answer.

    Attributes:
        deadline_ns: when it fails, by the monotonic clock; 0 for never.
        vectors: what is there already, by the number of the input.
        left: texts without a vector.
    """

    message: frames_pb2.Embed
    submitted_ns: int
    deadline_ns: int
    tokens: list[int] = field(default_factory=list)
    vectors: list[array[float]] = field(default_factory=list)
    left: int = 0
    first_batch_ns: int = 0
    compute_ns: int = 0

    @property
    def request_id(self) -> int:
        return self.message.request_id


@dataclass(slots=True, eq=False)
class _Text:
    """A text that waits for its vector, or is on its way to it in pieces.

    Attributes:
        read: tokens decoded.
        mean: of the vectors of those; only with mean pooling.
    """

    request: _Request
    number: int
    tokens: array[int]
    read: int = 0
    mean: list[float] = field(default_factory=list)


class Embedder:
    """Embeds texts of many requests together, taking one of each caller in turn.

    Not thread-safe. Every request gets exactly one frame: `embedded` or `failed`; one that is taken back gets none from
    here. The context is asked for at the first request, and again when a longer text comes than it was made for.

    A batch holds whole texts, as many as fit. A text that is longer than a batch is decoded in pieces, one a step,
    where attention is causal, and otherwise whole by itself.
    """

    def __init__(
        self, model: EmbeddingModel, background: Background, look: Callable[[], Container[int]] | None = None
    ) -> None:
        """*look* is called a few times a second while a batch is decoded, for the owner to see to what is urgent.

        It returns the requests that are to be cancelled; a batch for nobody else is interrupted. They are cancelled by
        `cancel` all the same, after the step.
        """
        self._model = model
        self._look = look
        self._background = background
        self._context: EmbeddingContext | None = None
        self._requests: dict[int, _Request] = {}
        self._waiting: dict[str, collections.deque[_Text]] = {}
        #: Callers with texts that wait, whose turn it is first.
        self._turns: collections.deque[str] = collections.deque()
        self._long: _Text | None = None

    @property
    def pending(self) -> int:
        """Requests that have no answer yet."""
        return len(self._requests)

    @property
    def ready(self) -> bool:
        """Whether there is something to decode."""
        return bool(self._turns) or self._long is not None

    @property
    def deadline(self) -> float | None:
        """The `time.monotonic()` at which the next request runs out of time, None when none does."""
        due = [request.deadline_ns for request in self._requests.values() if request.deadline_ns]
        return min(due) / 1e9 if due else None

    def submit(self, embed: frames_pb2.Embed) -> Frames:
        """Take a request; return its failure if it has one at once."""
        problem = self._problem(embed)
        if problem is not None:
            return [problem]
        now = time.monotonic_ns()
        request = _Request(embed, now, now + embed.timeout_ms * 1_000_000 if embed.timeout_ms > 0 else 0)
        self._requests[embed.request_id] = request
        size_bytes = sum(map(len, embed.inputs)) + len(embed.inputs) * len(embed.query)

        def read() -> list[array[int]] | TextError:
            try:
                return self._model.texts.tokens(embed)
            except TextError as error:
                return error

        if size_bytes <= INLINE_BYTES:
            return self._take(request, read())
        self._background.run(read, lambda found: self._take(request, found))
        return []

    def cancel(self, request_id: int) -> bool:
        """Take a request back, without a frame; return whether it was here."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._drop(request)
        return True

    def step(self, max_tokens: int = 0) -> Frames:
        """Decode at most one batch; return the frames that are ready.

        *max_tokens* makes the batch smaller than it could be, for the sake of those who wait for the next step; a text
        that has to be decoded whole is, whatever its length.
        """
        frames = self._expire()
        if not self.ready:
            return frames
        try:
            context = self._context_for_next()
        except ContextError as error:
            return frames + self._fail_all(self._next_requests(), str(error))
        room = min(context.shared_tokens, max_tokens) if max_tokens > 0 else context.shared_tokens
        pieces = [self._next_piece(context, room)] if self._long else self._gather(context, room)
        return frames + self._decode(context, pieces)

    def _problem(self, embed: frames_pb2.Embed) -> frames_pb2.RunnerFrame | None:
        ranks, model = embed.HasField("query"), self._model
        can_rank = model.pooling is Pooling.RANK
        if ranks and not can_rank:
            return failure(embed.request_id, _Kind.KIND_CAPABILITY, "the model does not rank", field="rerank")
        if can_rank and not ranks:
            message = "the model ranks documents, it gives no vectors"
            return failure(embed.request_id, _Kind.KIND_CAPABILITY, message, field="embedding")
        field, problem = "inputs", ""
        length = 1 if ranks else model.length
        if not embed.inputs:
            problem = "there is no text"
        elif not 0 <= embed.dimensions <= length:
            field = "dimensions"
            problem = f"dimensions is {embed.dimensions}, a vector of this model has {length} numbers"
        elif len(embed.inputs) * (embed.dimensions or length) * _FLOAT_BYTES > _MAX_VECTORS_BYTES:
            problem = f"the vectors of {len(embed.inputs)} texts would take more than {_MAX_VECTORS_BYTES >> 20} MiB"
        return failure(embed.request_id, _Kind.KIND_INVALID, problem, field=field) if problem else None

    def _take(self, request: _Request, found: list[array[int]] | TextError) -> Frames:
        """Queue the texts of a request that has its tokens."""
        if self._requests.get(request.request_id) is not request:
            return []  # it was taken back meanwhile, or its time ran out
        if isinstance(found, TextError):
            del self._requests[request.request_id]
            if found.tokens:
                return [too_long(request.request_id, tokens=found.tokens, context=self._model.num_ctx)]
            return [failure(request.request_id, _Kind.KIND_INVALID, str(found), field=found.field)]
        request.tokens = [len(tokens) for tokens in found]
        request.vectors = [array("f")] * len(found)
        request.left = len(found)
        caller = request.message.caller
        if caller not in self._waiting:
            self._waiting[caller] = collections.deque()
            self._turns.append(caller)
        self._waiting[caller] += [_Text(request, number, tokens) for number, tokens in enumerate(found)]
        return []

    def _expire(self) -> Frames:
        now = time.monotonic_ns()
        late = [request for request in self._requests.values() if request.deadline_ns and now >= request.deadline_ns]
        for request in late:
            del self._requests[request.request_id]
            self._drop(request)
        return [
            failure(request.request_id, _Kind.KIND_DEADLINE, f"it took longer than {request.message.timeout_ms} ms")
            for request in late
        ]

    def _drop(self, request: _Request) -> None:
        """Forget the texts of a request that wait or are on their way."""
        caller = request.message.caller
        waiting = self._waiting.get(caller)
        if waiting is not None:
            kept = collections.deque(text for text in waiting if text.request is not request)
            if kept:
                self._waiting[caller] = kept
            else:
                del self._waiting[caller]
                self._turns.remove(caller)
        if self._long is not None and self._long.request is request:
            self._long = None
            assert self._context is not None, "a text is on its way in a context"
            self._context.clear()

    def _context_for_next(self) -> EmbeddingContext:
        context = self._context
        if self._long is not None:
            assert context is not None, "a text is on its way in a context"
            return context
        longest = max(len(self._waiting[caller][0].tokens) for caller in self._turns)
        if context is None or longest > context.text_tokens:
            self._context = None
            self._context = context = self._model.context(longest)
        return context

    def _next_requests(self) -> list[_Request]:
        longest = max((self._waiting[caller][0] for caller in self._turns), key=lambda text: len(text.tokens))
        return [longest.request]

    def _gather(self, context: EmbeddingContext, room: int) -> list[tuple[_Text, int]]:
        """Take texts off the queue for one batch; return each with how many of its tokens are decoded now."""
        pieces: list[tuple[_Text, int]] = []
        while self._turns and len(pieces) < context.sequences:
            text = self._waiting[self._turns[0]][0]
            count = len(text.tokens)
            if count > room:
                if pieces:
                    break  # it comes first in the next batch
                self._pop_turn()
                if context.whole:
                    return [(text, count)]
                self._long = text
                return [self._next_piece(context, room)]
            self._pop_turn()
            pieces.append((text, count))
            room -= count
        return pieces

    def _pop_turn(self) -> None:
        """Take the next text off the queue; its caller goes to the end of the line."""
        caller = self._turns.popleft()
        waiting = self._waiting[caller]
        waiting.popleft()
        if waiting:
            self._turns.append(caller)
        else:
            del self._waiting[caller]

    def _next_piece(self, context: EmbeddingContext, room: int) -> tuple[_Text, int]:
        text = self._long
        assert text is not None, "there is a text in pieces"
        return text, min(len(text.tokens) - text.read, room, context.batch.capacity)

    def _decode(self, context: EmbeddingContext, pieces: list[tuple[_Text, int]]) -> Frames:
        batch = context.batch
        batch.clear()
        for sequence, (text, count) in enumerate(pieces):
            batch.add_embedded(text.tokens[text.read : text.read + count], text.read, sequence)
        start_ns = time.monotonic_ns()
        for text, _ in pieces:
            text.request.first_batch_ns = text.request.first_batch_ns or start_ns
        requests = {text.request for text, _ in pieces}
        code = context.decode(lambda: self._is_for_nobody(requests))
        if code == INTERRUPTED:
            self._long = None
            context.clear()
            return []
        vectors = [context.vector(sequence) for sequence in range(len(pieces))] if code == 0 else []
        # Reading the first vector waits for the computation.
        elapsed_ns = time.monotonic_ns() - start_ns
        for request in requests:
            request.compute_ns += elapsed_ns
        if code != 0 or not all(vectors):
            self._long = None
            context.clear()
            return self._fail_all([text.request for text, _ in pieces], f"the engine failed to decode (code {code})")
        frames: Frames = []
        for (text, count), vector in zip(pieces, vectors, strict=True):
            if context.pooling is Pooling.MEAN and count < len(text.tokens):
                vector = _add_to_mean(text, vector, count)
            first_piece = text.read == 0
            text.read += count
            if context.pooling is not Pooling.CLS or first_piece:
                text.request.vectors[text.number] = vector
            if text.read == len(text.tokens):
                self._long = None
                frames += self._note_done(text.request)
        if self._long is None:
            context.clear()
        return frames

    def _is_for_nobody(self, requests: set[_Request]) -> bool:
        """Tell whether all these requests are taken back, or out of time."""
        cancelled: Container[int] = self._look() if self._look is not None else ()
        now = time.monotonic_ns()
        return all(request.request_id in cancelled or 0 < request.deadline_ns <= now for request in requests)

    def _note_done(self, request: _Request) -> Frames:
        """Count a text that has its vector; return the answer when it was the last, or when the vector is broken."""
        request.left -= 1
        if request.left or request.request_id not in self._requests:
            return []
        del self._requests[request.request_id]
        message = request.message
        embedded = frames_pb2.Embedded(
            request_id=request.request_id,
            tokens=request.tokens,
            queue_ns=request.first_batch_ns - request.submitted_ns,
            compute_ns=request.compute_ns,
        )
        as_is = message.raw or message.HasField("query")
        for number, vector in enumerate(request.vectors):
            kept = vector[: message.dimensions] if message.dimensions else vector
            length = math.hypot(*kept)
            if not math.isfinite(length):
                problem = f"the vector of text {number + 1} has numbers that are not finite"
                return [failure(request.request_id, _Kind.KIND_ENGINE, problem)]
            scaled = kept if as_is or length == 0 else [value / length for value in kept]
            embedded.vectors.add(values=scaled)
        return [frames_pb2.RunnerFrame(embedded=embedded)]

    def _fail_all(self, requests: list[_Request], problem: str) -> Frames:
        """End requests; the engine does not say whose fault it was."""
        return [failure(request_id, _Kind.KIND_ENGINE, problem) for request_id in self._taken_back(requests)]

    def _taken_back(self, requests: list[_Request]) -> Iterator[int]:
        for request in requests:
            if self.cancel(request.request_id):
                yield request.request_id


def _add_to_mean(text: _Text, vector: array[float], count: int) -> array[float]:
    """Return the mean over what is read of a text, *count* more tokens with the mean *vector* included."""
    share = count / (text.read + count)
    if text.read:
        text.mean = [mean + (value - mean) * share for mean, value in zip(text.mean, vector, strict=True)]
    else:
        text.mean = list(vector)
    return array("f", text.mean)
