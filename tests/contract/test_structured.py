"""Constraints: what their interface promises, with a small vocabulary and with a real one."""

from __future__ import annotations

import array
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmd.runner.structured import Effort, FormatError
from tests.support.formats import Tokenizer

FORMATS = (
    {"json_object": True},
    {"json_schema": '{"type": "array", "items": {"enum": ["red", "green", 7]}, "maxItems": 3}'},
    {"json_schema": '{"type": "object", "properties": {"name": {"const": "hello"}}, "required": ["name"]}'},
    {"regex": r"[a-z]{2,5}(, [a-z]{2,5}){0,3}\."},
    {"regex": "(the|then|them)* end"},
    {"gbnf": 'root ::= [a-z]+ "b" | "(" root ")"\n'},
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), format_=st.sampled_from(FORMATS))
def test_taking_tokens_back_leads_to_the_same_place(
    tiny: Tokenizer, data: st.DataObject, format_: dict[str, str]
) -> None:
    constraint = tiny.compile(**format_)
    states = [(constraint.allowed(), constraint.accepting, constraint.complete)]
    for _ in range(data.draw(st.integers(1, 12))):
        if constraint.complete:
            break
        allowed = tiny.allowed(constraint)
        assert constraint.accept(allowed[data.draw(st.integers(0, len(allowed) - 1))])
        states.append((constraint.allowed(), constraint.accepting, constraint.complete))
    back = data.draw(st.integers(0, len(states) - 1))
    constraint.rollback(back)
    assert (constraint.allowed(), constraint.accepting, constraint.complete) == states[len(states) - 1 - back]


def test_a_copy_goes_its_own_way(tiny: Tokenizer) -> None:
    one = tiny.compile(regex="abc|xyz")
    a, x = tiny.tokenize("a")[0], tiny.tokenize("x")[0]
    other = one.copy()
    assert one.accept(a)
    assert other.accept(x)
    assert set(tiny.allowed(one)) <= tiny.spell("b")
    assert set(tiny.allowed(other)) <= tiny.spell("y")
    other.rollback(1)
    assert other.accept(a)


def test_a_token_that_does_not_fit_changes_nothing(tiny: Tokenizer) -> None:
    constraint = tiny.compile(regex="ab*")
    end = min(tiny.ends)
    a, b, c = (tiny.tokenize(letter)[0] for letter in "abc")
    assert not any(constraint.accept(token) for token in (b, c, end, -1, tiny.vocab.size))
    assert constraint.accept(a)
    assert not constraint.accept(c)
    assert constraint.accept(b)
    constraint.rollback(2)
    with pytest.raises(ValueError, match="cannot take back 1 of 0"):
        constraint.rollback(1)
    assert constraint.accept(a)


def test_the_end_is_allowed_exactly_where_the_text_is_whole(tiny: Tokenizer) -> None:
    constraint = tiny.compile(regex="ab*")
    a, b = tiny.tokenize("a")[0], tiny.tokenize("b")[0]
    assert tiny.ends.isdisjoint(tiny.allowed(constraint))
    assert not constraint.accepting
    constraint.accept(a)
    assert constraint.accepting
    assert not constraint.complete
    assert set(tiny.allowed(constraint)) == tiny.spell("b") | tiny.ends
    assert constraint.accept(min(tiny.ends))
    assert constraint.complete
    assert not constraint.accept(b)
    constraint.rollback(1)
    assert not constraint.complete
    assert constraint.accept(b)


def test_complete_means_that_only_the_end_may_follow(tiny: Tokenizer) -> None:
    constraint = tiny.compile(regex="ab")
    for token in tiny.tokenize("ab"):
        assert not constraint.complete
        assert constraint.accept(token)
    assert constraint.complete
    assert constraint.accepting
    assert set(tiny.allowed(constraint)) == tiny.ends
    empty = tiny.compile(regex="")
    assert empty.complete
    assert set(tiny.allowed(empty)) == tiny.ends


def test_logits_that_are_allowed_stay_as_they_are(tiny: Tokenizer) -> None:
    constraint = tiny.compile(regex="[ab]")
    logits = array.array("f", [token / 8 for token in range(tiny.vocab.size)])
    constraint.mask(logits.buffer_info()[0], len(logits))
    kept = tiny.spell("a") | tiny.spell("b")
    for token, logit in enumerate(logits):
        assert logit == (token / 8 if token in kept else float("-inf"))
    with pytest.raises(ValueError, match="logits"):
        constraint.mask(logits.buffer_info()[0], 10 * len(logits))


def test_tokens_without_text_are_never_allowed(tiny: Tokenizer) -> None:
    silent = {token for token in range(tiny.vocab.size) if tiny.vocab.piece(token) == b""}
    assert silent
    for format_ in FORMATS:
        assert silent.isdisjoint(tiny.allowed(tiny.compile(**format_)))


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]{3,8}",
        r"(a|ab)(c|bcd)*d?",
        r"\d{1,3}(\.\d+)?",
        "^(yes|no)$",
        "é+[^é]",
        "(?i)hello",
        "[^b]{0,4}x",
        "a|",
        "a/b\nc",
    ],
)
def test_what_a_regular_expression_allows_it_matches(tiny: Tokenizer, regex: str) -> None:
    ended = 0
    for seed in range(12):
        text, whole = tiny.ramble(tiny.compile(regex=regex), seed, length=10)
        ended += whole
        if whole:
            assert re.fullmatch(regex, text.decode()), text
    assert ended


@pytest.mark.parametrize(
    ("regex", "said"),
    [
        ("ab(c", "unclosed group at character 3"),
        ("a/b\nc)", "unopened group at character 6"),
        ("(?=a)", "look-around, including look-ahead and look-behind, is not supported at character 1"),
        (r"(a)\1", "backreferences are not supported at character 4"),
        (r"\bword", r"has \b where it cannot be used"),
        ("a$b", "an anchor (^ or $) where it cannot be used"),
        ("a\\", "ends with a backslash"),
        (r"[^\s\S]", "nothing can satisfy the regular expression"),
        ("x" * 20_000, "20,000 characters, but at most 16,384"),
        (r"(a{1000000}b){1000000}", "too complex"),
    ],
)
def test_a_regular_expression_that_cannot_be_used_is_explained(tiny: Tokenizer, regex: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        tiny.compile(regex=regex)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format_", [{}, {"json_object": False}])
def test_no_format_at_all_is_an_error(tiny: Tokenizer, format_: dict[str, bool]) -> None:
    with pytest.raises(FormatError, match="empty"):
        tiny.compile(**format_)


def test_a_format_is_compiled_once(tiny: Tokenizer) -> None:
    one, other = (tiny.compile(regex="[a-c]{3}") for _ in range(2))
    token = tiny.tokenize("a")[0]
    assert one.accept(token)
    other.rollback(0)
    with pytest.raises(ValueError, match="of 0 tokens"):
        other.rollback(1)


def test_an_answer_may_overdraw_its_time_a_little() -> None:
    effort = Effort()
    effort.spend(900_000_000)
    for _ in range(100):
        effort.spend(50_000_000)
    for _ in range(3):
        effort.spend(100_000_000)
    with pytest.raises(FormatError, match="too much time"):
        effort.spend(200_000_000)
    patient = Effort()
    for _ in range(1000):
        patient.spend(49_000_000)


def test_a_real_tokenizer_writes_what_is_demanded_with_its_own_tokens(llama3: Tokenizer) -> None:
    constraint = llama3.compile(regex="The quick brown fox jumps")
    pieces = []
    while not constraint.complete:
        (token,) = llama3.allowed(constraint)
        assert constraint.accept(token)
        pieces.append(llama3.vocab.piece(token))
    assert pieces == [b"The", b" quick", b" brown", b" fox", b" jumps"]


def test_all_ends_of_a_real_tokenizer_end_an_answer(llama3: Tokenizer) -> None:
    assert len(llama3.ends) > 1
    constraint = llama3.compile(regex="a+")
    assert constraint.accept(llama3.tokenize("a")[0])
    assert llama3.ends <= set(llama3.allowed(constraint))
