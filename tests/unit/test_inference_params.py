"""Which settings a request gets."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.parameters import (
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKENS,
    SEEDS,
    check_logit_bias,
    check_stop_tokens,
    effective,
    load_settings,
    sampling,
    usable_kv_type,
)
from lmd.registry.errors import InvalidRequest
from lmd.registry.gguf import GgufHeader, read_header
from lmd.registry.parameters import PARAMETERS, Kind
from tests.support.gguf_bytes import Value, gguf


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


@given(st.data())
def test_sampling_settings_reach_the_runner(data: st.DataObject) -> None:
    """Every setting that is not one of the load arrives under its own name; the rest of the frame is the request's."""
    requested: dict[str, Any] = {}
    for name, parameter in PARAMETERS.items():
        if parameter.load_time:
            continue
        low, high = parameter.minimum, parameter.maximum
        match parameter.kind:
            case Kind.TEXTS:
                requested[name] = data.draw(st.lists(st.text("abc\n", min_size=1), min_size=1, max_size=3))
            case Kind.BOOL:
                requested[name] = data.draw(st.booleans())
            case Kind.INT:
                assert low is not None
                assert high is not None
                requested[name] = data.draw(st.integers(int(low), int(high)))
            case Kind.FLOAT:
                requested[name] = data.draw(st.floats(low, high, width=16, exclude_min=parameter.above_minimum))
    requested["seed"] = data.draw(st.integers(0, SEEDS - 1))
    made = sampling(effective(requested, {}, num_ctx=1, train_ctx=0))
    texts = [name for name, parameter in PARAMETERS.items() if parameter.kind is Kind.TEXTS]
    found = {name: list(getattr(made, name)) if name in texts else getattr(made, name) for name in requested}
    assert found == requested
    names = {field.name for field in made.DESCRIPTOR.fields}
    assert names == set(requested) | {"logit_bias", "stop_tokens"}


def shaped(head: int, architecture: str = "llama") -> GgufHeader:
    metadata: dict[str, Value] = {
        "block_count": 1,
        "embedding_length": head,
        "attention.head_count": 1,
    }
    data = gguf({"general.architecture": architecture, **{f"{architecture}.{k}": v for k, v in metadata.items()}})
    return read_header(io.BytesIO(data), len(data))


def kv_type(wanted: str | None, header: GgufHeader, default: str = "f16") -> str:
    asked = {} if wanted is None else {"kv_type": wanted}
    made = effective(asked, {}, num_ctx=256, train_ctx=0, kv_type=usable_kv_type(header, default))
    return load_settings(made, header).kv_type


def test_keys_and_values_are_kept_as_the_request_the_manifest_or_the_daemon_says() -> None:
    assert kv_type(None, shaped(64)) == "f16"
    assert kv_type(None, shaped(64), "q8_0") == "q8_0"
    assert kv_type("Q4_0", shaped(64), "q8_0") == "q4_0"


def test_a_default_that_the_engine_cannot_do_for_a_model_is_not_taken_and_a_wish_refused() -> None:
    assert kv_type(None, shaped(80), "q8_0") == "f16"
    with pytest.raises(InvalidRequest, match="cannot be kept in q8_0: its heads have 80 numbers") as caught:
        kv_type("q8_0", shaped(80))
    assert caught.value.metadata == {"field": "kv_type"}


@pytest.mark.parametrize("architecture", ["bert", "mamba"])
def test_what_keeps_no_keys_takes_any_type(architecture: str) -> None:
    assert kv_type("q8_0", shaped(80, architecture)) == "f16"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name, parameter in PARAMETERS.items() if parameter.kind is Kind.FLOAT])
def test_what_is_no_number_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"`{name}` must be a number"):
        merged({name: value})


def test_a_negative_seed_is_refused_unless_it_asks_for_a_random_one() -> None:
    assert merged({"seed": -1})["seed"] == -1
    with pytest.raises(InvalidRequest, match="`seed` must be a whole number, at least -1, not -2"):
        merged({"seed": -2})


def test_biases_of_tokens() -> None:
    biases = {0: 100.0, 5: -100.0, 7: -math.inf, 9: 0.5}
    assert check_logit_bias(biases) == biases
    assert check_logit_bias({}) == {}
    assert len(check_logit_bias(dict.fromkeys(range(MAX_LOGIT_BIASES), 1.0))) == MAX_LOGIT_BIASES


@pytest.mark.parametrize(
    ("biases", "words"),
    [
        ({1: math.nan}, "token 1 must be from -100 to 100, or -infinity, not nan"),
        ({1: math.inf}, "not inf"),
        ({1: 100.5}, "not 100.5"),
        ({-1: 0.0}, "the token -1"),
        ({True: 0.0}, "the token True"),
        ({1: True}, "not True"),
        (dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 0.0), "1025 tokens; at most 1024"),
    ],
)
def test_biases_that_are_refused(biases: dict[int, float], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check_logit_bias(biases)
    assert caught.value.metadata == {"field": "logit_bias"}


def test_stop_tokens() -> None:
    assert check_stop_tokens([3, 1, 3]) == (3, 1)
    assert check_stop_tokens([]) == ()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([-1], "the token -1"), ([2**31], "the token 2147483648"), ([0] * (MAX_STOP_TOKENS + 1), "65 tokens; at most 64")],
)
def test_stop_tokens_that_are_refused(tokens: list[int], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check_stop_tokens(tokens)
    assert caught.value.metadata == {"field": "stop_tokens"}
