"""Whatever a model prefers to say, what it says in a format is valid when it ends; what cannot be honoured is refused.

The model is a random choice among the tokens that are allowed, so these walk where no trained model would go.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.runner.structured import Constraint, FormatCompiler, FormatError
from lmd.runner.v1.frames_pb2 import Format
from lmd.runner.vocab import Vocab
from tests.support.formats import Tokenizer
from tests.support.shared_models import STORIES

LONGEST = 400


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(STORIES)


@pytest.fixture(scope="module")
def vocab(tokenizer: Tokenizer) -> Vocab:
    return tokenizer.vocab


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> FormatCompiler:
    return tokenizer.compiler


def allowed(constraint: Constraint, vocab: Vocab) -> list[int]:
    """Return the tokens that a mask leaves possible."""
    scores = (ctypes.c_float * vocab.size)()
    constraint.mask(ctypes.addressof(scores), vocab.size)
    return [token for token, score in enumerate(scores) if score == 0.0]


def walk(constraint: Constraint, vocab: Vocab, seed: int) -> str | None:
    """Say allowed tokens by chance until the end; None when it does not come."""
    chance = random.Random(seed)
    said = b""
    for _ in range(LONGEST):
        if constraint.complete:
            return said.decode()
        token = chance.choice(allowed(constraint, vocab))
        assert constraint.accept(token)
        piece = vocab.piece(token)
        if piece is None:
            assert constraint.complete
            return said.decode()
        said += piece
    return None


def is_object(text: str) -> None:
    assert isinstance(json.loads(text), dict)


def is_person(text: str) -> None:
    person = json.loads(text)
    assert set(person) <= {"name", "age", "tags"}
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 5
    assert 3 <= person["age"] <= 130
    assert isinstance(person["age"], int)
    assert all(tag in ("a", "b") for tag in person.get("tags", []))
    assert len(person.get("tags", [])) <= 2


PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 3, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])"
SUM = 'root ::= term ("+" term){0,3} "=" # a sum\nterm ::= [0-9]{1,2}'


def matches(pattern: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text)

    return check


@pytest.mark.parametrize(
    ("format_", "check"),
    [
        (Format(json_schema=PERSON), is_person),
        (Format(regex=DATE), matches(DATE)),
        (Format(gbnf=SUM), matches(r"[0-9]{1,2}(\+[0-9]{1,2}){0,3}=")),
        (Format(gbnf='root ::= "é" | "日本" [x-z]+'), matches("é|日本[x-z]+")),
    ],
    ids=["schema", "regex", "gbnf", "characters"],
)
def test_what_ends_is_valid(
    compiler: FormatCompiler, vocab: Vocab, format_: Format, check: Callable[[str], None]
) -> None:
    template = compiler.compile(format_)
    ended = [text for seed in range(40) if (text := walk(template.copy(), vocab, seed)) is not None]
    assert len(ended) >= 10
    for text in ended:
        check(text)


def test_json_mode_gives_objects(compiler: FormatCompiler, vocab: Vocab) -> None:
    template = compiler.compile(Format(json_object=True))
    ended = [text for seed in range(60) if (text := walk(template.copy(), vocab, seed)) is not None]
    assert ended
    for text in ended:
        is_object(text)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.data())
def test_taking_back_leads_to_the_same_place(
    compiler: FormatCompiler, vocab: Vocab, seed: int, steps: int, data: st.DataObject
) -> None:
    chance = random.Random(seed)
    constraint = compiler.compile(Format(json_schema=PERSON))
    places = [allowed(constraint, vocab)]
    for _ in range(steps):
        if constraint.complete:
            break
        assert constraint.accept(chance.choice(places[-1]))
        places.append(allowed(constraint, vocab))
    back = data.draw(st.integers(0, len(places) - 1))
    copy = constraint.copy()
    constraint.rollback(back)
    assert allowed(constraint, vocab) == places[len(places) - 1 - back]
    assert allowed(copy, vocab) == places[-1]


def test_a_token_that_does_not_fit_is_refused_and_changes_nothing(compiler: FormatCompiler, vocab: Vocab) -> None:
    constraint = compiler.compile(Format(regex="yes"))
    before = allowed(constraint, vocab)
    wrong = next(token for token in range(vocab.size) if token not in before)
    assert not constraint.accept(wrong)
    assert allowed(constraint, vocab) == before


@pytest.mark.parametrize(
    ("format_", "said"),
    [
        (Format(), "empty"),
        (Format(json_schema="{"), "line 1"),
        (Format(json_schema="[]"), "object"),
        (Format(json_schema='{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Format(json_schema='{"$ref": "#/$defs/missing"}'), "missing"),
        (Format(json_schema='{"type": "integer", "minimum": 3, "maximum": 1}'), ""),
        (Format(json_schema="false"), ""),
        (Format(regex="(a"), "regular expression"),
        (Format(regex="a\\"), "backslash"),
        (Format(gbnf="root ::= missing"), "missing"),
        (Format(gbnf='start ::= "a"'), "root"),
        (Format(gbnf='root ::= "a'), "line 1"),
        (Format(json_schema='{"a":' * 3000 + "1" + "}" * 3000), ""),
        (Format(gbnf="root ::= root"), ""),
    ],
    ids=map(str, itertools.count()),
)
def test_what_cannot_be_honoured_says_why(compiler: FormatCompiler, format_: Format, said: str) -> None:
    with pytest.raises(FormatError) as error:
        compiler.compile(format_)
    assert said in str(error.value)
    assert len(str(error.value)) > 10
    assert "\n" not in str(error.value)
