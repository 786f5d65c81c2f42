"""A request on its way through the engine: waiting, then a job for each of its answers."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lmd.runner.adapters import Scales
from lmd.runner.reading import ParsedStream, Reading
from lmd.runner.scopes import adapted_scope
from lmd.runner.seams import TokenSampler
from lmd.runner.slots import Slot
from lmd.runner.speculation import Speculation
from lmd.runner.text import TextStream
from lmd.runner.v1 import frames_pb2

STOP = frames_pb2.Finished.REASON_STOP
LENGTH = frames_pb2.Finished.REASON_LENGTH
TOOL_CALLS = frames_pb2.Finished.REASON_TOOL_CALLS

_NO_MARKERS: dict[int, bytes] = {}


class Constraint(Protocol):
    """What an answer must look like, token by token. A call raises `FormatError` when that gets too complex."""

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""

    def mask(self, logits_address: int, count: int) -> None:
        """Forbid in place, among *count* scores, the tokens that cannot come next."""

    def accept(self, token: int) -> bool:
        """Go on after *token*; false when it does not fit."""

    def copy(self) -> Constraint:
        """Return one that goes its own way from here."""


@dataclass(slots=True, eq=False)
class Request:
    """A submission, from its arrival to its end.

    Attributes:
        order: grows with every request.
        prompt: its tokens; empty until rendered and tokenized.
        constraint: what its answers must look like; each answer gets a copy.
        reading: how its answers are taken apart; None when they are text.
        opens_thoughts: the prompt ends inside thoughts.
        adapters: the scales of adapters it is decoded with; None for the model's own.
        started_ns: when its first answer got a slot; 0 before.
        cached_tokens: tokens of the prompt that were in memory when the first answer started.
        ends: how its answers ended, by number.
    """

    message: frames_pb2.Submit
    order: int
    submitted_ns: int = field(default_factory=time.monotonic_ns)
    prompt: array[int] = field(default_factory=lambda: array("i"))
    constraint: Constraint | None = None
    reading: Reading | None = None
    opens_thoughts: bool = False
    adapters: Scales | None = None
    dropped_messages: int = 0
    dropped_tokens: int = 0
    started_ns: int = 0
    cached_tokens: int = 0
    shifted_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    ends: dict[int, frames_pb2.Finished] = field(default_factory=dict)

    @property
    def request_id(self) -> int:
        """Its id, the daemon's."""
        return self.message.request_id

    @property
    def deadline_ns(self) -> int | None:
        """The `time.monotonic_ns()` at which it fails; None for never."""
        timeout_ms = self.message.timeout_ms
        return self.submitted_ns + timeout_ms * 10**6 if timeout_ms > 0 else None

    @property
    def scope(self) -> str:
        """Whose cached prefixes it may use."""
        scope = self.message.cache_scope
        return scope if self.adapters is None else adapted_scope(scope, self.adapters)

    @property
    def caller(self) -> str:
        """Whom its tokens are counted for."""
        return self.message.caller

    @property
    def weight(self) -> float:
        """The caller's share relative to others."""
        return self.message.weight or 1.0

    @property
    def choices(self) -> int:
        """Answers to generate."""
        return max(1, self.message.choices)

    @property
    def shifts(self) -> bool:
        """Whether older parts of the context make room for the answer."""
        return self.message.context_policy == frames_pb2.CONTEXT_POLICY_SHIFT

    @property
    def alone(self) -> bool:
        """Whether it is decoded in batches of its own."""
        return self.message.sampling.deterministic

    @property
    def markers(self) -> Mapping[int, bytes]:
        """The bytes of special tokens that its answers are read by."""
        return self.reading.markers if self.reading is not None else _NO_MARKERS

    def stream(self) -> TextStream | ParsedStream:
        """Return what makes text, or parts, of the tokens of one answer."""
        stops = self.message.sampling.stop
        if self.reading is None:
            return TextStream(stops)
        return self.reading.stream(stops, opens_thoughts=self.opens_thoughts)

    def finished(self) -> frames_pb2.Finished:
        """Return the end of the whole request: the first answer's, with the counts of all."""
        first = self.ends[0]
        whole = frames_pb2.Finished()
        whole.CopyFrom(first)
        whole.prompt_tokens = len(self.prompt)
        whole.cached_tokens = self.cached_tokens
        whole.generated_tokens = sum(end.generated_tokens for end in self.ends.values())
        whole.dropped_messages = self.dropped_messages
        whole.dropped_tokens = self.dropped_tokens
        whole.shifted_tokens = self.shifted_tokens
        whole.drafted_tokens = self.drafted_tokens
        whole.accepted_tokens = self.accepted_tokens
        if self.choices > 1:
            for _, end in sorted(self.ends.items()):
                whole.choices.add(reason=end.reason, generated_tokens=end.generated_tokens, stop=end.stop)
        return whole


@dataclass(slots=True, eq=False)
class Place:
    """A place in the queue: one answer of a request that needs a slot.

    Attributes:
        number: which of the request's answers.
        waits: whether it lets an older request read their common beginning first.
    """

    request: Request
    number: int = 0
    waits: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """An answer that has a slot.

    Attributes:
        target: tokens that the slot is to hold before the next one is sampled: the prompt, and what was generated and
            decoded since.
        limit: the most tokens it may generate.
        overtaken: tokens of other prompts decoded while this one waited for its turn.
        next_token: sampled but not decoded yet; None while the prompt is decoded.
    """

    request: Request
    number: int
    slot: Slot
    sampler: TokenSampler
    text: TextStream | ParsedStream
    limit: int
    target: array[int]
    constraint: Constraint | None = None
    speculation: Speculation | None = None
    generated_tokens: int = 0
    overtaken: int = 0
    next_token: int | None = None
    started_ns: int = field(default_factory=time.monotonic_ns)
    first_token_ns: int = 0

    @property
    def unread(self) -> int:
        """Tokens of the target that are still to be decoded."""
        return len(self.target) - len(self.slot.tokens)

    def finished(self, reason: frames_pb2.Finished.Reason.ValueType) -> frames_pb2.Finished:
        """Return the counts and timings of this answer as of now."""
        now = time.monotonic_ns()
        first_token_ns = self.first_token_ns or now
        return frames_pb2.Finished(
            request_id=self.request.request_id,
            reason=reason,
            generated_tokens=self.generated_tokens,
            queue_ns=self.started_ns - self.request.submitted_ns,
            prompt_ns=first_token_ns - self.started_ns,
            generate_ns=now - first_token_ns,
            stop=self.text.stop,
        )
