"""How many tokens of an answer were thoughts."""

from __future__ import annotations

from lmd.daemon.answer_events import Delta
from lmd.daemon.http.answer_tally import ThinkingTally


def test_tokens_of_thoughts() -> None:
    tally = ThinkingTally()
    tally.add(Delta("", 4, thinking="hmmm"))
    tally.add(Delta("", 5))
    tally.add(Delta("said", 15))
    assert tally.thinking_tokens == 4


def test_tokens_of_a_delta_with_both_are_shared_out_by_length() -> None:
    tally = ThinkingTally()
    tally.add(Delta("abc", 8, thinking="d"))
    assert tally.thinking_tokens == 2
