"""A request on its way through the engine."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field

from lmd.runner.sampling import Sampler
from lmd.runner.slots import Slot
from lmd.runner.text import TextStream
from lmd.runner.v1 import frames_pb2


@dataclass(slots=True, eq=False)
class Request:
    """A request that waits for a slot.

    Attributes:
        order: grows with every request.
        prompt: its tokens; empty until rendered and tokenized.
        waits: whether it lets an older request read their common beginning first.
    """

    request_id: int
    order: int
    sampling: frames_pb2.Sampling
    scope: str
    submitted_ns: int = field(default_factory=time.monotonic_ns)
    prompt: array[int] = field(default_factory=lambda: array("i"))
    waits: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """A request that has a slot.

    Attributes:
        cached_tokens: tokens of the prompt that were in memory already.
        limit: the most tokens it may generate.
        overtaken: tokens of other prompts decoded while this one waited for its turn.
        next_token: sampled but not decoded yet; None while the prompt is decoded.
    """

    request: Request
    slot: Slot
    sampler: Sampler
    text: TextStream
    cached_tokens: int
    limit: int
    generated_tokens: int = 0
    overtaken: int = 0
    next_token: int | None = None
    started_ns: int = field(default_factory=time.monotonic_ns)
    first_token_ns: int = 0

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be decoded."""
        return len(self.request.prompt) - len(self.slot.tokens)

    def finished(self, reason: frames_pb2.Finished.Reason.ValueType) -> frames_pb2.Finished:
        """Return its counts and timings as of now."""
        now = time.monotonic_ns()
        first_token_ns = self.first_token_ns or now
        return frames_pb2.Finished(
            request_id=self.request.request_id,
            reason=reason,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            queue_ns=self.started_ns - self.request.submitted_ns,
            prompt_ns=first_token_ns - self.started_ns,
            generate_ns=now - first_token_ns,
            stop=self.text.stop,
        )


def plan_prefill(jobs: list[Job], budget: int) -> list[tuple[Job, int]]:
    """Share *budget* tokens among prompts that are being decoded; return who decodes how many.

    The prompt with the fewest tokens left goes first, since it delays the others least. Every token that overtakes a
    prompt counts as one token less of its own, so a long one waits for no more tokens of others than it has itself.
    """
    plan: list[tuple[Job, int]] = []
    left = budget
    for job in sorted(jobs, key=lambda job: (job.unread - job.overtaken, job.request.order)):
        count = min(job.unread, left)
        if count:
            plan.append((job, count))
            left -= count
        else:
            job.overtaken += budget
    return plan
