"""Measures one answer while it is made, from the moment at which its model is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from lmd.daemon.answer_events import Delta, Done
from lmd.daemon.outcomes import note_failure
from lmd.daemon.runner_answer import Answer


class Totals(Protocol):
    """Where the measures go."""

    def note_first_token(self, operation: str, after_ns: int) -> None:
        """Note when the first of an answer was there."""

    def note_prompt(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Note that a runner took a prompt."""

    def note_generated(self, tokens: int, *, drafted: int = 0, accepted: int = 0) -> None:
        """Note the tokens of an answer."""

    def note_finished(self, operation: str, *, total_ns: int, load_ns: int, queue_ns: int | None = None) -> None:
        """Note how long it took."""


class AnswerMeter:
    """One answer, from its arrival to its end; a context manager around each try to make it.

    An answer that fails or that its caller leaves counts with the tokens that were handed on until then. A block that
    ends well without `done` is a try that is followed by another.
    """

    __slots__ = ("_generated", "_operation", "_totals", "answer", "arrived_ns", "done")

    def __init__(self, totals: Totals, operation: str) -> None:
        self.arrived_ns = time.monotonic_ns()
        #: What the runner says; the last one, when a request is tried again.
        self.answer: Answer | None = None
        self.done: Done | None = None
        self._totals = totals
        self._operation = operation
        self._generated: dict[int, int] = {}

    def note(self, deltas: Sequence[Delta]) -> None:
        """Take note of what is handed on; called once for all that came together, not for every token."""
        if not self._generated and deltas:
            self._totals.note_first_token(self._operation, time.monotonic_ns() - self.arrived_ns)
        for delta in deltas:
            self._generated[delta.choice] = delta.generated_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done, totals = self.done, self._totals
        if done is not None:
            totals.note_prompt(done.prompt_tokens, done.cached_tokens)
            totals.note_generated(done.generated_tokens, drafted=done.drafted_tokens, accepted=done.accepted_tokens)
            totals.note_finished(self._operation, total_ns=done.total_ns, load_ns=done.load_ns, queue_ns=done.queue_ns)
            return
        if error is None:
            return
        if self.answer is not None and self.answer.started is not None:
            totals.note_prompt(self.answer.started.prompt_tokens, self.answer.started.cached_tokens)
            totals.note_generated(sum(self._generated.values()))
        # Not when the answer is left: whether that was the caller's doing is for the door to say.
        if isinstance(error, Exception):
            note_failure(error)
