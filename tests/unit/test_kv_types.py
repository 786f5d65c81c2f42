from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.config import Config
from lmd.daemon.residency.values import LoadSettings
from lmd.registry.kv_types import DEFAULT_KV_TYPE, KV_TYPES, is_as_exact, is_quantized, kv_type_bytes, most_exact
from lmd.runner import kv_types as runner_types

TYPES = st.sampled_from(list(KV_TYPES))


def test_the_runner_the_configuration_and_the_registry_know_the_same_types() -> None:
    assert all(runner_types.is_known(name) for name in KV_TYPES)
    assert [name for name in KV_TYPES if runner_types.is_quantized(name)] == list(filter(is_quantized, KV_TYPES))
    legal = Config.model_fields["runtime"].annotation.model_fields["kv_type"].annotation.__args__  # type: ignore[union-attr]
    assert legal == tuple(KV_TYPES)
    assert DEFAULT_KV_TYPE in KV_TYPES


def test_bytes_are_of_whole_blocks() -> None:
    assert kv_type_bytes(64, "f16") == 128
    assert kv_type_bytes(64, "q8_0") == 2 * 34
    assert kv_type_bytes(65, "q8_0") == 3 * 34
    assert kv_type_bytes(0, "q4_0") == 0


@pytest.mark.parametrize(
    ("loaded", "wanted", "serves"),
    [
        ("f16", "f16", True),
        ("f16", "q8_0", True),
        ("q8_0", "f16", False),
        ("q8_0", "q4_0", True),
        ("q4_0", "q8_0", False),
        ("f32", "bf16", True),
        ("f16", "bf16", False),
        ("bf16", "f16", False),
    ],
)
def test_what_is_kept_more_exactly_serves_those_who_would_do_with_less(loaded: str, wanted: str, serves: bool) -> None:
    assert is_as_exact(loaded, wanted) is serves
    assert LoadSettings(256, kv_type=wanted).served_by(LoadSettings(256, kv_type=loaded)) is serves


@given(TYPES, TYPES, TYPES)
def test_serving_is_transitive(one: str, two: str, three: str) -> None:
    assert is_as_exact(one, one)
    if is_as_exact(one, two) and is_as_exact(two, three):
        assert is_as_exact(one, three)


@given(st.lists(TYPES.filter(lambda name: name != "bf16"), min_size=1, max_size=4))
def test_the_most_exact_serves_all(wanted: list[str]) -> None:
    assert all(is_as_exact(most_exact(*wanted), other) for other in wanted)


def test_of_two_that_do_not_stand_for_each_other_the_first_wins() -> None:
    assert {most_exact(*pair) for pair in permutations(("f16", "bf16"))} == {"f16", "bf16"}
    settings = LoadSettings(256, kv_type="q4_0")
    assert settings.with_kv_type_of([LoadSettings(256, kv_type="bf16")]).kv_type == "bf16"
