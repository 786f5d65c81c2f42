"""Steps read as much of the prompts as takes the time that others may be kept waiting, whatever a token costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.runner.prefill_pace import PrefillPace


def paced(token_s: float, capacity: int = 512) -> PrefillPace:
    pace = PrefillPace(capacity)
    pace.note(100, 100 * token_s)
    return pace


@pytest.mark.parametrize(
    ("token_s", "reading", "generating", "tokens"),
    [
        (0.00005, 1, 4, 512),
        (0.0013, 1, 4, 256),
        (0.0013, 4, 1, 512),
        (0.0013, 4, 4, 512),
        (0.0013, 1, 1, 256),
        (0.005, 1, 4, 64),
        (0.005, 4, 1, 192),
        (0.005, 4, 0, 384),
        (0.05, 1, 1, 32),
        (0.05, 1, 0, 40),
    ],
)
def test_the_share_of_a_step(token_s: float, reading: int, generating: int, tokens: int) -> None:
    assert paced(token_s).budget(reading, generating) == tokens


def test_before_anything_was_measured_answers_are_spared() -> None:
    assert PrefillPace(512).budget(1, 1) == 128
    assert PrefillPace(512).budget(8, 1) == 128
    assert PrefillPace(512).budget(8, 0) == 512


def test_it_follows_what_a_token_costs_now_and_ignores_steps_that_say_little() -> None:
    pace = paced(0.0013)
    pace.note(1, 10)
    assert pace.budget(1, 1) == 256
    for _ in range(8):
        pace.note(256, 256 * 0.005)
    assert pace.budget(1, 1) == 64


@given(st.integers(1, 4096), st.floats(1e-7, 10), st.integers(1, 64), st.integers(0, 64))
def test_a_step_always_gets_on_and_is_never_overfull(
    capacity: int, token_s: float, reading: int, generating: int
) -> None:
    tokens = paced(token_s, capacity).budget(reading, generating)
    assert min(32, capacity) <= tokens <= capacity
