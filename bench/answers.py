"""One way to talk to every server that is measured, and the times at which its answers came."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.meter import percentile


@dataclass(slots=True)
class Answer:
    """One answer, with times from `time.perf_counter`.

    Attributes:
        arrivals_s: when each piece of text came; both servers send one a token.
        complete: whether it ended by itself.
        prompt_tokens, cached_tokens, generated_tokens: as the server counts them at the end.
    """

    begin_s: float
    arrivals_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    complete: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    @property
    def first_token_s(self) -> float:
        """From the request to the first text."""
        return self.arrivals_s[0] - self.begin_s

    def worst_gap_s(self, begin_s: float, end_s: float) -> float:
        """Return the longest time without text that overlaps the given time."""
        return max(
            (
                later - earlier
                for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
                if later > begin_s and earlier < end_s
            ),
            default=0.0,
        )


class Server(Protocol):
    """A running server with the benchmark's model.

    Attributes:
        name: "ours" or "theirs".
    """

    name: str

    @property
    def pids(self) -> list[int]:
        """All its processes."""

    @property
    def model_pids(self) -> list[int]:
        """The processes that hold the model."""

    def ask(
        self,
        prompt: str,
        tokens: int,
        *,
        stop: threading.Event | None = None,
        on_text: Callable[[], None] | None = None,
    ) -> Answer:
        """Continue *prompt* greedily by *tokens* tokens; hang up when *stop* is set. Callable from many threads."""


def ask_all(server: Server, prompts: Sequence[str], tokens: int) -> list[Answer]:
    """Ask all at once, each from a thread of its own."""
    start = threading.Barrier(len(prompts))

    def ask(prompt: str) -> Answer:
        start.wait()
        answer = server.ask(prompt, tokens)
        check(server, answer, tokens)
        return answer

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def check(server: Server, answer: Answer, tokens: int) -> None:
    """Refuse an answer that is not what was asked for, which would make the comparison void."""
    if not answer.complete or answer.generated_tokens != tokens:
        raise RuntimeError(f"{server.name} answered with {answer.generated_tokens} tokens instead of {tokens}")


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Return tokens a second of all together, and how long first tokens took."""
    begin, end = min(answer.begin_s for answer in answers), max(answer.end_s for answer in answers)
    first = [answer.first_token_s for answer in answers]
    return {
        "tokens_per_s": sum(answer.generated_tokens for answer in answers) / (end - begin),
        "ttft_p50_s": percentile(first, 0.5),
        "ttft_p95_s": percentile(first, 0.95),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
    }


def now_s() -> float:
    return time.perf_counter()
