"""Which settings a request gets."""

from __future__ import annotations

import pytest

from lmd.daemon.parameters import SEEDS, effective, load_settings, sampling
from lmd.registry.errors import InvalidRequest
from lmd.registry.parameters import PARAMETERS


def merged(requested: dict[str, object] | None = None, manifest: dict[str, object] | None = None) -> dict[str, object]:
    return dict(effective(requested or {}, manifest or {}, num_ctx=4096, train_ctx=0))  # type: ignore[arg-type]


def test_later_wins() -> None:
    assert merged()["temperature"] == 0.8
    assert merged(manifest={"temperature": 0.5})["temperature"] == 0.5
    assert merged({"temperature": 0}, {"temperature": 0.5})["temperature"] == 0.0


def test_every_parameter_has_a_value() -> None:
    assert set(merged()) == set(PARAMETERS)


def test_stop_texts_replace_those_of_the_manifest() -> None:
    assert merged(manifest={"stop": ("</s>",)})["stop"] == ("</s>",)
    assert merged({"stop": ["a", "b"]}, {"stop": ("</s>",)})["stop"] == ("a", "b")


@pytest.mark.parametrize(
    ("requested", "manifest", "train_ctx", "expected"),
    [
        (None, None, 0, 4096),
        (None, None, 512, 512),
        (None, None, 131072, 4096),
        (None, 8192, 512, 8192),
        (2048, 8192, 512, 2048),
    ],
)
def test_context(requested: int | None, manifest: int | None, train_ctx: int, expected: int) -> None:
    """Only the default is cut to what the model was trained with: who names a number gets it."""
    made = effective(
        {} if requested is None else {"num_ctx": requested},
        {} if manifest is None else {"num_ctx": manifest},
        num_ctx=4096,
        train_ctx=train_ctx,
    )
    assert load_settings(made).num_ctx == expected


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("top_p", 7), ("num_ctx", 1), ("temprature", 1), ("stop", [""])]
)
def test_bad_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        merged({name: value})
    assert caught.value.metadata["field"] == name


def test_seed_is_picked_once_for_each_request() -> None:
    picked = {sampling(effective({}, {}, num_ctx=1, train_ctx=0)).seed for _ in range(8)}
    assert len(picked) > 1
    assert max(picked) < SEEDS
    assert sampling(effective({"seed": 7}, {}, num_ctx=1, train_ctx=0)).seed == 7
    # 2**32 - 1 is the engine's "pick one": with it the answer would not repeat.
    assert sampling(effective({"seed": 2**32 - 1}, {}, num_ctx=1, train_ctx=0)).seed == 0


def test_sampling_settings_reach_the_runner() -> None:
    requested = {"temperature": 0.5, "top_k": 3, "min_p": 0.25, "mirostat": 2, "num_predict": 9, "stop": ["x"]}
    made = sampling(effective(requested, {}, num_ctx=1, train_ctx=0))
    assert {name: getattr(made, name) for name in requested} == requested
    names = {field.name for field in made.DESCRIPTOR.fields}
    assert names == {name for name, parameter in PARAMETERS.items() if not parameter.load_time}
