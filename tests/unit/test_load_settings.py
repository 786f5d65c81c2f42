"""Which contexts will do, and which loaded model serves a request."""

from __future__ import annotations

import pytest

from lmd.daemon.parameters import context_floor, effective, load_settings
from lmd.daemon.residency.values import LoadSettings


@pytest.mark.parametrize(
    ("num_ctx", "min_ctx", "expected"),
    [
        pytest.param(4096, 0, (4096,), id="asked for by name"),
        pytest.param(4096, 1024, (4096, 3072, 2048, 1536, 1024), id="down to the floor"),
        pytest.param(4096, 1500, (4096, 3072, 2048, 1536, 1500), id="the floor itself is the last"),
        pytest.param(4096, 4096, (4096,), id="the floor is the wish"),
        pytest.param(1000, 4096, (1000,), id="the floor is above the wish"),
    ],
)
def test_contexts_that_will_do(num_ctx: int, min_ctx: int, expected: tuple[int, ...]) -> None:
    assert LoadSettings(num_ctx, min_ctx=min_ctx).contexts() == expected


@pytest.mark.parametrize(
    ("wanted", "loaded", "serves"),
    [
        pytest.param(LoadSettings(2048), LoadSettings(4096), True, id="a larger context serves a smaller one"),
        pytest.param(LoadSettings(4096), LoadSettings(2048), False, id="not the other way round"),
        pytest.param(
            LoadSettings(4096, min_ctx=1024),
            LoadSettings(2048, wanted_ctx=4096),
            True,
            id="what did not fit is not tried again",
        ),
        pytest.param(
            LoadSettings(4096, min_ctx=1024),
            LoadSettings(2048),
            False,
            id="a small context that was asked for is no reason to have less",
        ),
        pytest.param(
            LoadSettings(4096, min_ctx=3000), LoadSettings(2048, wanted_ctx=4096), False, id="below the floor"
        ),
        pytest.param(
            LoadSettings(3000),
            LoadSettings(2048, wanted_ctx=4096),
            False,
            id="who asks by name gets it, or is refused",
        ),
    ],
)
def test_who_is_served(wanted: LoadSettings, loaded: LoadSettings, serves: bool) -> None:
    assert wanted.served_by(loaded) is serves


def test_only_what_nobody_asked_for_is_made_smaller() -> None:
    assert context_floor({}, {}, 1024) == 1024
    assert context_floor({"num_ctx": 4096}, {}, 1024) == 0
    assert context_floor({}, {"num_ctx": 4096}, 1024) == 0
    made = effective({}, {}, num_ctx=4096, train_ctx=0)
    assert load_settings(made, min_ctx=1024).contexts() == (4096, 3072, 2048, 1536, 1024)
    assert load_settings(made, min_ctx=8192).contexts() == (4096,)
    assert LoadSettings(4096, min_ctx=2048).within(1000).contexts() == (1000,)
