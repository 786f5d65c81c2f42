"""Fields of Ollama's requests that come in several kinds, and its options."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.answer_options import ContextPolicy, Format, FormatKind
from lmd.daemon.conversations import Think
from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.ollama.options import parameters_of
from lmd.daemon.http.ollama.requests import ChatBody, GenerateBody
from lmd.daemon.http.ollama.wishes import (
    answer_options,
    check_images,
    effective_think,
    format_of,
    keep_alive_of,
    think_of,
)
from lmd.daemon.parameters import effective
from lmd.daemon.residency.values import FOR_EVER, MAX_KEEP_ALIVE
from lmd.registry.errors import CapabilityMissing
from lmd.registry.parameters import PARAMETERS, Kind


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (None, None),
        (0, timedelta(0)),
        (300, timedelta(minutes=5)),
        (0.5, timedelta(milliseconds=500)),
        (-1, FOR_EVER),
        (-0.001, FOR_EVER),
        (10**300, MAX_KEEP_ALIVE),
        ("0", timedelta(0)),
        ("-0s", timedelta(0)),
        ("5m", timedelta(minutes=5)),
        ("+1h30m", timedelta(hours=1.5)),
        ("1m1h", timedelta(hours=1, minutes=1)),
        ("1.5h", timedelta(minutes=90)),
        (".5s", timedelta(milliseconds=500)),
        ("1.s", timedelta(seconds=1)),
        ("100ms", timedelta(milliseconds=100)),
        ("7µs", timedelta(microseconds=7)),
        ("2000ns", timedelta(microseconds=2)),
        ("-1m", FOR_EVER),
        ("9" * 90 + "h", MAX_KEEP_ALIVE),
    ],
)
def test_keep_alive(value: object, meant: timedelta | None) -> None:
    assert keep_alive_of(value) == meant


@pytest.mark.parametrize(
    "value", ["300", "-1", "", "5 m", "5x", "m", ".s", "1h-5m", "٣s", "1" * 101 + "s", True, [], {}]
)
def test_what_is_no_keep_alive(value: object) -> None:
    with pytest.raises(Refusal, match=r"^keep_alive ") as refused:
        keep_alive_of(value)
    assert refused.value.status == 400


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text())
def test_any_keep_alive_is_read_or_refused(value: object) -> None:
    try:
        meant = keep_alive_of(value)
    except Refusal:
        return
    assert meant is not None
    assert meant == FOR_EVER or timedelta(0) <= meant <= MAX_KEEP_ALIVE


def test_think() -> None:
    values = (None, True, False, "low", "medium", "high", "max")
    meant = [think_of(value) for value in values]
    assert meant == [None, Think.ON, Think.OFF, Think.LOW, Think.MEDIUM, Think.HIGH, Think.HIGH]


@pytest.mark.parametrize("value", ["", "true", "LOW", 1, 0, [], {}])
def test_what_is_no_think_lists_what_is(value: object) -> None:
    with pytest.raises(Refusal) as refused:
        think_of(value)
    assert refused.value.status == 400
    for legal in ("true", "false", '"low"', '"medium"', '"high"', '"max"'):
        assert legal in refused.value.message


def test_models_that_think_do_so_unless_told_not_to() -> None:
    thinker: Any = SimpleNamespace(name="m:latest", capabilities=("completion", "chat", "thinking"))
    plain: Any = SimpleNamespace(name="m:latest", capabilities=("completion", "chat"))
    assert effective_think(thinker, None) == Think.ON
    assert effective_think(thinker, Think.OFF) == Think.OFF
    assert effective_think(thinker, Think.HIGH) == Think.HIGH
    assert effective_think(plain, None) is None
    assert effective_think(plain, Think.OFF) is None
    with pytest.raises(CapabilityMissing):
        effective_think(plain, Think.ON)


def test_format() -> None:
    assert format_of(None) is None
    assert format_of("") is None
    assert format_of("json") == Format(FormatKind.JSON_OBJECT)
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    made = format_of(schema)
    assert made == Format(FormatKind.JSON_SCHEMA, '{"type": "object", "properties": {"é": {"type": "string"}}}')


@pytest.mark.parametrize("value", ["xml", "JSON", 1, True, ["json"]])
def test_what_is_no_format(value: object) -> None:
    with pytest.raises(Refusal, match="format must be") as refused:
        format_of(value)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("truncate", "shift", "generate", "chat"),
    [
        (None, None, ContextPolicy.SHIFT, ContextPolicy.SHIFT),
        (True, True, ContextPolicy.SHIFT, ContextPolicy.SHIFT),
        (None, False, ContextPolicy.ERROR, ContextPolicy.TRUNCATE),
        (False, None, ContextPolicy.ERROR, ContextPolicy.ERROR),
        (False, False, ContextPolicy.ERROR, ContextPolicy.ERROR),
    ],
)
def test_a_context_that_is_too_short(
    truncate: bool | None, shift: bool | None, generate: ContextPolicy, chat: ContextPolicy
) -> None:
    assert answer_options(GenerateBody(truncate=truncate, shift=shift)).context_policy == generate
    assert answer_options(ChatBody(truncate=truncate, shift=shift)).context_policy == chat


def test_logprobs_are_those_asked_for() -> None:
    assert answer_options(GenerateBody(top_logprobs=3)).top_logprobs is None
    assert answer_options(GenerateBody(logprobs=True)).top_logprobs == 0
    assert answer_options(GenerateBody(logprobs=True, top_logprobs=3)).top_logprobs == 3


def test_images() -> None:
    check_images("m", [None, []])
    with pytest.raises(Refusal, match="base64"):
        check_images("m", [["no image!"]])
    with pytest.raises(Refusal, match="does not support images"):
        check_images("m", [[], ["aGVsbG8="]])


# What Ollama's clients send when everything is set, and older ones more than that.
LEGACY = {
    "numa": False,
    "num_keep": 4,
    "main_gpu": 0,
    "low_vram": False,
    "f16_kv": True,
    "logits_all": False,
    "vocab_only": False,
    "use_mlock": False,
    "embedding_only": False,
    "tfs_z": 1.0,
    "penalize_newline": True,
}


def test_legacy_options_and_unknown_ones_are_ignored() -> None:
    assert parameters_of(None) == {}
    assert parameters_of({**LEGACY, "no_such_option": {"a": 1}, "temperature": None}) == {}
    old = {"mirostat": 0, "mirostat_tau": 0.8, "mirostat_eta": 0.6}
    assert parameters_of(old) == old


def test_floats_count_as_whole_numbers_where_those_are_meant() -> None:
    asked = parameters_of({"num_predict": 5.9, "seed": 7.0, "num_keep": 4.0, "top_p": 1})
    assert asked == {"num_predict": 5, "seed": 7, "top_p": 1}
    assert type(asked["num_predict"]) is int


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_ctx", "4096", 'option "num_ctx" must be of type integer'),
        ("num_predict", True, 'option "num_predict" must be of type integer'),
        ("num_keep", "4", 'option "num_keep" must be of type integer'),
        ("use_mmap", 1, 'option "use_mmap" must be of type boolean'),
        ("temperature", "0.8", 'option "temperature" must be of type float32'),
        ("stop", "x", 'option "stop" must be of type array'),
        ("stop", [1], 'option "stop" must be an array of strings'),
    ],
)
def test_options_of_the_wrong_kind(name: str, value: object, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        parameters_of({name: value})
    assert (refused.value.status, refused.value.message) == (500, said)


def test_values_below_our_ranges_mean_what_they_mean_to_the_engine() -> None:
    asked = parameters_of(
        {"num_predict": -2, "num_gpu": -5, "top_k": -1, "temperature": -1.0, "seed": -2, "stop": ["", "x"]}
    )
    assert asked == {"num_predict": -1, "num_gpu": -1, "top_k": 0, "temperature": 0, "seed": 2**32 - 2, "stop": ["x"]}
    effective(asked, {}, num_ctx=4096, train_ctx=0)
    assert parameters_of({"seed": -1}) == {"seed": -1}


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_is_an_option(name: str) -> None:
    value: dict[Kind, object] = {Kind.INT: 1, Kind.FLOAT: 0.5, Kind.BOOL: True, Kind.TEXTS: ["x"], Kind.CHOICE: "f16"}
    sent = value[PARAMETERS[name].kind]
    assert parameters_of({name: sent}) == {name: sent}
    with pytest.raises(Refusal):
        parameters_of({name: {}})
