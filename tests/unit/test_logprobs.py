"""Log probabilities are those of the softmax of the logits, whatever these are."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.runner.logprobs import IMPOSSIBLE, logprobs_of

INF, NAN = math.inf, math.nan


def ask(logits: Sequence[float], chosen: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    row = (ctypes.c_float * len(logits))(*logits)
    found = logprobs_of(ctypes.addressof(row), len(logits), chosen, top)
    assert [str(one) for one in row] == [str(ctypes.c_float(one).value) for one in logits], "it changed the logits"
    return found


def reference(logits: Sequence[float], top: int) -> tuple[list[float], list[int]]:
    """All log probabilities, and the most likely tokens."""
    numbers = [-INF if math.isnan(one) else one for one in logits]
    best = max(numbers)
    if math.isinf(best):
        numbers = [0.0 if best > 0 and one == INF else -INF for one in numbers]
        best = max(numbers)
    total = math.fsum(math.exp(one - best) for one in numbers) if best > -INF else 1.0
    everything = [max(one - best - math.log(total), IMPOSSIBLE) if one > -INF else IMPOSSIBLE for one in numbers]
    return everything, sorted(range(len(numbers)), key=lambda token: (-numbers[token], token))[:top]


logit = st.one_of(
    st.floats(-40, 40, width=32),
    # Ties, and what no model should say but a broken one does.
    st.sampled_from([0.0, 1.0, 2.0, -INF, INF, NAN, 3e38, -3e38]),
)


@given(st.lists(logit, min_size=1, max_size=40), st.integers(0, 20), st.data())
def test_any_row(logits: list[float], top: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(0, len(logits) - 1))
    logprob, best = ask(logits, chosen, top)
    everything, tokens = reference(logits, top)
    assert logprob == pytest.approx(everything[chosen], abs=2e-6, rel=1e-6)
    assert [token for token, _ in best] == tokens
    assert [value for _, value in best] == pytest.approx([everything[token] for token in tokens], abs=2e-6, rel=1e-6)


@given(st.integers(0, 10_000), st.integers(0, 20), st.integers(1000, 6000), st.integers(1, 50))
def test_large_rows(seed: int, top: int, size: int, step: int) -> None:
    """Long enough that the best are looked for block by block; rounded, so that there are ties between blocks."""
    import numpy as np

    logits = (np.random.default_rng(seed).standard_normal(size).astype(np.float32) * step).round().tolist()
    everything, tokens = reference(logits, top)
    logprob, best = ask(logits, size - 1, top)
    assert [token for token, _ in best] == tokens
    assert logprob == pytest.approx(everything[-1], abs=1e-5, rel=1e-6)


def test_the_last_tokens_are_no_part_of_a_block_and_still_found() -> None:
    logits = [0.0] * 128 * 30 + [0.0] * 7 + [5.0]
    logprob, best = ask(logits, len(logits) - 1, 3)
    assert [token for token, _ in best] == [len(logits) - 1, 0, 1]
    assert logprob == best[0][1] == pytest.approx(5 - math.log(math.exp(5) + len(logits) - 1))


def test_probabilities_add_up() -> None:
    _, best = ask([0.5, -1.0, 2.0, 0.0], 0, 20)
    assert len(best) == 4
    assert math.fsum(math.exp(value) for _, value in best) == pytest.approx(1)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([-INF, -INF], [IMPOSSIBLE, IMPOSSIBLE]),
        ([NAN, NAN], [IMPOSSIBLE, IMPOSSIBLE]),
        ([NAN, 1.0], [IMPOSSIBLE, 0.0]),
        ([INF, INF], [-math.log(2), -math.log(2)]),
        ([INF, 5.0], [0.0, IMPOSSIBLE]),
        ([0.0, -2000.0], [0.0, -2000.0]),
    ],
)
def test_what_is_no_ordinary_number(logits: list[float], expected: list[float]) -> None:
    assert [ask(logits, token, 0)[0] for token in (0, 1)] == pytest.approx(expected)
