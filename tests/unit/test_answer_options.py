from __future__ import annotations

import math
from typing import Any

import pytest

from lmd.daemon.answer_options import (
    MAX_FORMAT_BYTES,
    AnswerOptions,
    ContextPolicy,
    Format,
    FormatKind,
    Priority,
)
from lmd.daemon.services.answers import options_of
from lmd.registry.errors import InvalidRequest
from lmd.runner.v1 import frames_pb2 as frames
from lmd.v1 import inference_service_pb2 as pb


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("choices", -1, "from 0 to 16, not -1"),
        ("choices", 17, "from 0 to 16, not 17"),
        ("top_logprobs", -1, "from 0 to 20, not -1"),
        ("top_logprobs", 21, "from 0 to 20, not 21"),
        ("logit_bias", {1: math.nan}, "token 1 must be from -100 to 100, or -infinity, not nan"),
        ("logit_bias", {1: math.inf}, "not inf"),
        ("logit_bias", {1: 100.5}, "not 100.5"),
        ("logit_bias", {-1: 1.0}, "names the token -1"),
        ("logit_bias", dict.fromkeys(range(1025), 1.0), "has 1025 tokens; at most 1024"),
        ("stop_tokens", [-5], "names the token -5"),
        ("stop_tokens", list(range(65)), "has 65 tokens; at most 64"),
        ("timeout_s", 0.0, "above 0 s, not 0 s"),
        ("timeout_s", -1.0, "not -1 s"),
        ("timeout_s", math.nan, "not nan s"),
        ("format", Format(FormatKind.REGEX, ""), "the `regex` of `format` is empty"),
        ("format", Format(FormatKind.JSON_SCHEMA, " \n"), "is empty"),
        ("format", Format(FormatKind.GBNF, "x" * (MAX_FORMAT_BYTES + 1)), "at most 262144 are legal"),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AnswerOptions(**{field: value}).checked()
    assert words in caught.value.message
    assert caught.value.metadata["field"] == field.removesuffix("_s")


def test_the_ends_of_the_ranges_are_legal() -> None:
    options = AnswerOptions(
        choices=16,
        top_logprobs=0,
        logit_bias={0: -math.inf, 2**31 - 1: 100.0, 5: -100.0},
        stop_tokens=range(64),
        timeout_s=0.001,
        format=Format(FormatKind.JSON_OBJECT),
    )
    assert options.checked() is options


def test_everything_reaches_the_runner() -> None:
    message = pb.AnswerOptions(
        format=pb.Format(json_schema='{"type": "object"}'),
        choices=3,
        top_logprobs=0,
        logit_bias={7: -math.inf, 9: 2.5},
        stop_tokens=[4, 5, 4],
        priority=pb.PRIORITY_BATCH,
        context_policy=pb.CONTEXT_POLICY_SHIFT,
    )
    message.timeout.FromMilliseconds(1500)
    options = options_of(message)
    assert options.timeout_s == 1.5
    submit = frames.Submit()
    options.checked().apply(submit)
    assert submit.format.json_schema == '{"type": "object"}'
    assert submit.choices == 3
    assert submit.HasField("top_logprobs")
    assert submit.top_logprobs == 0
    assert dict(submit.sampling.logit_bias) == {7: -math.inf, 9: 2.5}
    assert list(submit.sampling.stop_tokens) == [4, 5]
    assert submit.priority == frames.PRIORITY_BATCH
    assert submit.context_policy == frames.CONTEXT_POLICY_SHIFT


def test_nothing_asked_for_is_the_defaults() -> None:
    assert options_of(pb.AnswerOptions()) == AnswerOptions()
    submit = frames.Submit()
    AnswerOptions().apply(submit)
    assert not submit.HasField("format")
    assert not submit.HasField("top_logprobs")
    assert submit.priority == frames.PRIORITY_INTERACTIVE
    assert submit.context_policy == frames.CONTEXT_POLICY_ERROR


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (pb.Format(json_object=True), Format(FormatKind.JSON_OBJECT)),
        (pb.Format(json_object=False), None),
        (pb.Format(regex="a+"), Format(FormatKind.REGEX, "a+")),
        (pb.Format(gbnf="root ::= x"), Format(FormatKind.GBNF, "root ::= x")),
    ],
)
def test_formats(message: pb.Format, expected: Format | None) -> None:
    assert options_of(pb.AnswerOptions(format=message)).format == expected


@pytest.mark.parametrize("kind", list(FormatKind))
def test_each_kind_of_format_has_its_frame(kind: FormatKind) -> None:
    submit = frames.Submit()
    AnswerOptions(format=Format(kind, "text")).apply(submit)
    assert submit.format.WhichOneof("format") == kind.value


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.AnswerOptions(format=pb.Format()), "format"),
        (pb.AnswerOptions(priority=9), "priority"),  # type: ignore[arg-type]
        (pb.AnswerOptions(context_policy=9), "context_policy"),  # type: ignore[arg-type]
    ],
)
def test_what_this_version_does_not_know_is_refused(message: pb.AnswerOptions, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        options_of(message)
    assert caught.value.metadata["field"] == field


def test_every_value_of_the_wire_is_known() -> None:
    for priority in pb.Priority.values():
        assert options_of(pb.AnswerOptions(priority=priority)).priority in Priority
    for policy in pb.ContextPolicy.values():
        assert options_of(pb.AnswerOptions(context_policy=policy)).context_policy in ContextPolicy
