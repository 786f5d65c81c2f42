"""Many clients, more models than fit: how long anyone waits, and how often models are loaded."""

from __future__ import annotations

import pytest

from tests.support.model_swaps import Load, run_swaps


def answers(mean_s: float) -> tuple[float, ...]:
    """Short, middling and long ones, as benchmarks mix them."""
    return mean_s * 0.4, mean_s * 1.6, mean_s * 3.2


@pytest.mark.parametrize(
    ("reload_s", "answer_s"),
    [
        pytest.param(0.1, 0.5, id="loads are quick"),
        pytest.param(0.3, 0.15, id="answers are quick"),
        pytest.param(1.0, 0.5, id="loads take as long as answers"),
        pytest.param(1.0, 5.0, id="answers are slow"),
    ],
)
def test_nobody_waits_long_and_models_are_not_thrashed(reload_s: float, answer_s: float) -> None:
    """Six clients ask for any of three models of which two fit, each again as soon as it has its answer."""
    load = Load(reload_s=reload_s, answer_s=answers(answer_s), duration_s=100 * (answer_s + reload_s))
    outcome = run_swaps(load)
    assert outcome.evicted_busy == 0
    assert outcome.most_held <= 2 * 100
    assert max(outcome.waits_s) < 3 * outcome.fair_share_s(load.clients)
    assert outcome.lru_loads(load.room) > 3 * outcome.loads


def test_slow_loads_cost_a_little_of_both() -> None:
    outcome = run_swaps(Load(reload_s=5, answer_s=answers(0.5), duration_s=500))
    assert max(outcome.waits_s) < 4 * outcome.fair_share_s(6)
    assert outcome.lru_loads(2) > 2 * outcome.loads


def test_a_client_that_is_alone_never_waits_for_more_than_a_load() -> None:
    """Nothing is gained by keeping what nobody else asks for: each swap begins at once."""
    outcome = run_swaps(Load(models=2, room=1, clients=1, reload_s=0.5, duration_s=60))
    assert max(outcome.waits_s) < 0.5 + 0.1


def test_nobody_starves_behind_models_that_are_always_busy() -> None:
    """Seven models take turns in the room of two."""
    load = Load(models=7, room=2, clients=20, reload_s=0.5, answer_s=answers(0.5), duration_s=200)
    outcome = run_swaps(load)
    assert max(outcome.waits_s) < 5 * outcome.fair_share_s(load.clients)
    assert len(outcome.waits_s) == len(outcome.arrivals)
