"""What serving is measured with: each case puts one server to work and returns figures that another's are held against.

The bars are the product's promises. They are ratios of medians within one run, so that they mean the same on every
machine; only memory is a difference.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.answers import Answer, Server, ask_all, check, now_s, summary
from bench.meter import burners, rss_bytes, settle
from bench.prompts import prompt, shared_prompts

CHATS = 4
LONG_TOKENS = 4000
NEW_TOKENS = 64
CURVE = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Setting:
    """What both servers are started with: answers at the same time, and tokens of context for each."""

    slots: int
    num_ctx: int


SERVING = Setting(8, 2048)
MIXED = Setting(CHATS + 1, 5120)
MANY = Setting(16, 1024)


@dataclass(frozen=True, slots=True)
class Bar:
    """A promise about one figure: ours is at least or at most *limit* times theirs, or theirs and *limit* more."""

    metric: str
    kind: str  # ">=", "<=" or "+"
    limit: float

    def compare(self, ours: float, theirs: float) -> float:
        """Return what is held against the limit."""
        return ours - theirs if self.kind == "+" else ours / theirs

    def met(self, ours: float, theirs: float) -> bool:
        value = self.compare(ours, theirs)
        return value >= self.limit if self.kind == ">=" else value <= self.limit

    @property
    def text(self) -> str:
        return f"within {self.limit:g} more" if self.kind == "+" else f"{self.kind} {self.limit:g} x"


@dataclass(frozen=True, slots=True)
class Case:
    """A measurement of both servers, repeated in rounds.

    Attributes:
        measure: takes the server and the number of the round, and returns figures by name.
        rounds: replaces the usual number of rounds; None keeps it.
        undisturbed: whether nothing else may run at the same time.
    """

    name: str
    title: str
    setting: Setting
    measure: Callable[[Server, int], Mapping[str, float]]
    bars: tuple[Bar, ...] = ()
    rounds: int | None = None
    undisturbed: bool = True


def one_stream(server: Server, number: int) -> Mapping[str, float]:
    return summary(ask_all(server, [prompt(16, "one", number)], NEW_TOKENS))


def distinct(server: Server, number: int) -> Mapping[str, float]:
    return summary(ask_all(server, [prompt(256, "distinct", number, client) for client in range(8)], NEW_TOKENS))


def shared(server: Server, number: int) -> Mapping[str, float]:
    """Ask with a beginning that no prompt had before, then the same again."""
    prompts = shared_prompts(8, 1000, 24, number)
    cold, again = (summary(ask_all(server, prompts, NEW_TOKENS)) for _ in range(2))
    return {f"{when}_{name}": value for when, of in (("cold", cold), ("again", again)) for name, value in of.items()}


def contended(server: Server, number: int) -> Mapping[str, float]:
    with burners(2):
        return summary(ask_all(server, [prompt(16, "contended", number)], NEW_TOKENS // 2))


def mixed(server: Server, number: int) -> Mapping[str, float]:
    """Let a long prompt arrive when all chats are running; they go on until it has its answer."""
    stop = threading.Event()
    texts = threading.Semaphore(0)
    with concurrent.futures.ThreadPoolExecutor(CHATS) as pool:
        prompts = [prompt(64, "chat", number, chat) for chat in range(CHATS)]
        running = [pool.submit(server.ask, text, 4096, stop=stop, on_text=texts.release) for text in prompts]
        try:
            # A few words from each; only how many there are in all is known, and that is enough.
            for _ in range(CHATS * 12):
                while not texts.acquire(timeout=1):
                    if any(chat.done() for chat in running):
                        raise RuntimeError(f"{server.name}: a chat ended before the long prompt came")
            begin = now_s()
            long = server.ask(prompt(LONG_TOKENS, "long", number), 8)
            end = now_s()
        finally:
            stop.set()
    chats: list[Answer] = [chat.result() for chat in running]
    check(server, long, 8)
    if any(chat.complete for chat in chats):
        raise RuntimeError(f"{server.name}: a chat ended while the long prompt was read")
    settle(server.pids)
    during = sum(1 for chat in chats for at in chat.arrivals_s if begin < at < end)
    return {
        "worst_gap_s": max(chat.worst_gap_s(begin, end) for chat in chats),
        "long_ttft_s": long.first_token_s,
        "chat_tokens_per_s": during / (end - begin),
        "prompt_tokens": long.prompt_tokens,
    }


def memory(server: Server, number: int) -> Mapping[str, float]:
    """Weigh what holds the model when it has just served all its slots once."""
    distinct(server, 1_000_000 + number)
    return {"rss_mb": rss_bytes(server.model_pids) / 1e6}


def _clients(count: int) -> Callable[[Server, int], Mapping[str, float]]:
    def measure(server: Server, number: int) -> Mapping[str, float]:
        prompts = [prompt(64, "curve", count, number, client) for client in range(count)]
        return summary(ask_all(server, prompts, NEW_TOKENS))

    return measure


CASES = (
    Case("memory", "memory after 8 answers", SERVING, memory, (Bar("rss_mb", "+", 80),), rounds=1),
    Case("one", f"1 stream, {NEW_TOKENS} new tokens", SERVING, one_stream, (Bar("tokens_per_s", ">=", 0.97),)),
    Case(
        "distinct",
        "8 different prompts of 256 tokens",
        SERVING,
        distinct,
        (Bar("tokens_per_s", ">=", 1.0), Bar("ttft_p95_s", "<=", 1.0)),
    ),
    Case(
        "shared",
        "8 clients share a beginning of 1,000 tokens",
        SERVING,
        shared,
        (
            Bar("cold_tokens_per_s", ">=", 2.0),
            Bar("cold_ttft_p95_s", "<=", 0.3),
            Bar("again_tokens_per_s", ">=", 1.2),
        ),
    ),
    Case(
        "contended",
        "1 stream beside 2 processes that compute",
        SERVING,
        contended,
        (Bar("tokens_per_s", ">=", 5.0),),
        undisturbed=False,
    ),
    Case(
        "mixed",
        f"a prompt of {LONG_TOKENS:,} tokens arrives during {CHATS} chats",
        MIXED,
        mixed,
        (Bar("worst_gap_s", "<=", 0.5),),
    ),
    *(Case(f"curve-{count}", f"{count} clients, prompts of 64 tokens", MANY, _clients(count), ()) for count in CURVE),
)
