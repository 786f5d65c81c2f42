"""What a stream of an answer yields, in terms of plain values."""

from __future__ import annotations

from dataclasses import dataclass

from lmd.daemon.conversations import ToolCall
from lmd.daemon.residency.values import Waiting


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its bytes (which need not be whole characters), and the natural logarithm of its probability.

    *top* holds the most likely tokens at its place, best first, each without alternatives of its own.
    """

    id: int
    token: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """The next of one choice: text, thoughts (whole characters, each), complete calls of functions, or several of them.

    Where a delta has both, thoughts come before the text, and calls after it.
    *generated_tokens* counts from the start of the choice. *logprobs* tells, when asked for, of the tokens since the
    last delta of the choice; the text may lag behind them.
    """

    text: str
    generated_tokens: int
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """What is known when a request gets its slot, before its first text: the same counts as in its `Done`."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class ChoiceDone:
    """How one of several answers ended; *finish_reason* is "stop", "length" or "tool_calls"."""

    finish_reason: str
    generated_tokens: int
    stop: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer; *finish_reason* is "stop", "length" or "tool_calls".

    With several *choices*, *finish_reason* and *stop* are those of the first, and *generated_tokens* are those of all.
    """

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    total_ns: int
    load_ns: int
    queue_ns: int
    prompt_ns: int
    generate_ns: int
    seed: int
    stop: str
    choices: tuple[ChoiceDone, ...] = ()
    dropped_messages: int = 0
    dropped_tokens: int = 0
    shifted_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


Event = Waiting | Delta | Done
