"""A format begins to hold once a model has thought, whatever tokens its thoughts and their end are made of."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.runner.after_thinking import AfterThinking
from lmd.runner.answer_style import Gate, gate_of
from lmd.runner.forced_calls import call_grammar
from lmd.runner.v1.frames_pb2 import Format, Tool
from tests.support.answers import STYLES, calls_in, read
from tests.support.formats import Tokenizer

OBJECT = Format(json_schema='{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
THINK = Gate("<think>", "</think>")


def behind(tokenizer: Tokenizer, gate: Gate, *, opened: bool = False, format_: Format = OBJECT) -> AfterThinking:
    constraint = tokenizer.compiler.compile(format_, gate)
    assert isinstance(constraint, AfterThinking)
    return constraint.opened() if opened else constraint


def say(tokenizer: Tokenizer, constraint: AfterThinking, text: str) -> bool:
    """Say a text, and check that each token was allowed exactly if it is accepted."""
    for token in tokenizer.tokenize(text):
        # Of tokens that are the same text a mask may have only one.
        piece = tokenizer.vocab.piece(token)
        allowed = any(tokenizer.vocab.piece(other) == piece for other in tokenizer.allowed(constraint))
        assert constraint.accept(token) is allowed, (text, piece)
        if not allowed:
            return False
    return True


@pytest.mark.parametrize("fixture", ["tiny", "llama3"])
def test_any_text_may_be_thought_and_then_the_format_holds(fixture: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(fixture)
    constraint = behind(tokenizer, THINK, opened=True)
    assert say(tokenizer, constraint, 'Hm, {"a": </thin <think> a < b </ </think')
    assert constraint.thinking
    assert say(tokenizer, constraint, ">")
    assert not constraint.thinking
    assert not say(tokenizer, constraint.copy(), "text")
    assert say(tokenizer, constraint, '{"a": 1}')
    assert constraint.accepting


def test_the_answer_cannot_end_before_the_format_holds(tiny: Tokenizer) -> None:
    constraint = behind(tiny, THINK, opened=True)
    for text in ("", "hm", "</think>", '{"a": '):
        assert say(tiny, constraint, text)
        assert not tiny.ends & set(tiny.allowed(constraint))
        assert not any(constraint.accept(token) for token in tiny.ends)
        assert not constraint.accepting
        assert not constraint.complete
    assert say(tiny, constraint, "1}")
    assert tiny.ends & set(tiny.allowed(constraint)) or constraint.complete
    assert constraint.accepting


def test_a_model_may_think_or_answer_at_once(tiny: Tokenizer) -> None:
    constraint = behind(tiny, THINK)
    answers, thinks = constraint.copy(), constraint.copy()
    assert say(tiny, answers, '{"a": 1}')
    assert say(tiny, thinks, '<think>{"b": </think>\n\n{"a": 1}')
    assert answers.accepting
    assert thinks.accepting
    assert not say(tiny, constraint.copy(), "text")
    assert not say(tiny, constraint.copy(), "<thin {")


def test_an_opener_and_a_format_may_begin_alike(tiny: Tokenizer) -> None:
    tags = Format(regex="<[a-z]+>x")
    for text in ("<think>hm</think><think>x", "<thing>x", "<t>x"):
        constraint = behind(tiny, THINK, format_=tags)
        assert say(tiny, constraint, text)
        assert constraint.accepting, text


def test_line_breaks_may_come_after_thoughts_but_not_for_ever(llama3: Tokenizer) -> None:
    constraint = behind(llama3, THINK, opened=True)
    assert say(llama3, constraint, "hm</think>")
    assert say(llama3, constraint.copy(), '\n\n{"a": 1}')
    assert not say(llama3, constraint.copy(), "\n" * 9)
    # One token may be the end of the closer and line breaks, but not the beginning of the answer.
    joined = {llama3.vocab.piece(token): token for token in range(llama3.vocab.size)}
    for piece, follows in ((b">\n\n", True), (b">", True), (b">{", False), (b">a", False)):
        constraint = behind(llama3, THINK, opened=True)
        assert say(llama3, constraint, "hm</think")
        token = joined[piece]
        assert (token in llama3.allowed(constraint)) is follows
        assert constraint.accept(token) is follows
        assert constraint.thinking is not follows


def test_copies_go_their_own_way(tiny: Tokenizer) -> None:
    constraint = behind(tiny, THINK, opened=True)
    assert say(tiny, constraint, "hm</th")
    other = constraint.copy()
    assert say(tiny, other, 'ink>{"a": 1}')
    assert other.accepting
    assert constraint.thinking
    assert say(tiny, constraint, "at is not the end</think>")
    assert not constraint.accepting


def test_overlaps_of_the_closer_are_followed(tiny: Tokenizer) -> None:
    gate = Gate("<<", "aabaab")
    for thoughts in ("aabaab", "aaabaab", "aabaaabaab", "aabaaaabaab"):
        constraint = behind(tiny, gate, opened=True)
        assert say(tiny, constraint, thoughts)
        assert not constraint.thinking, thoughts


def test_messages_in_channels(tiny: Tokenizer) -> None:
    gate = gate_of(STYLES["channels"], calls=False)
    assert gate is not None
    final = '<|channel|>final<|message|>{"a": 1}'
    for text in (final, f"<|channel|>analysis<|message|>hm {{<|end|><|start|>assistant{final}"):
        constraint = behind(tiny, gate)
        assert say(tiny, constraint, text)
        assert constraint.accepting
    assert not say(tiny, behind(tiny, gate), '{"a": 1}')
    assert not say(tiny, behind(tiny, gate), "<|channel|>final<|message|>text")
    assert not say(tiny, behind(tiny, gate), "<|channel|>analysis<|message|>hm<|end|>\n")


def test_special_tokens_are_markers_too(tiny: Tokenizer) -> None:
    special = tiny.vocab.tokenize(b"<|im_start|>", add_special=False, parse_special=True)[0]
    assert tiny.vocab.piece(special) == b""
    constraint = behind(tiny, Gate("<think>", "<|im_start|>", lead_after="<|im_start|>"), opened=True)
    assert say(tiny, constraint, "hm")
    assert constraint.accept(special)
    assert not constraint.thinking
    assert tiny.allowed(constraint)[0] == special
    assert constraint.accept(special)
    assert say(tiny, constraint, '{"a": 1}')
    assert constraint.accepting


@pytest.mark.parametrize("name", ["hermes", "tagged", "mistral", "generic", "channels"])
@given(seed=st.integers(0, 2**32), opened=st.booleans())
@settings(max_examples=10)
def test_forced_calls_after_thoughts_are_calls(tiny: Tokenizer, name: str, seed: int, opened: bool) -> None:
    style = STYLES[name]
    schema = {"type": "object", "properties": {"s": {"enum": ["a", "b"]}}, "additionalProperties": False}
    tools = [Tool(name="f", parameters=json.dumps(schema))]
    gate = gate_of(style, calls=True)
    assert gate is not None
    constraint = tiny.compiler.compile(call_grammar(style, tools, ""), gate)
    assert isinstance(constraint, AfterThinking)
    choices = random.Random(seed)
    thoughts = "".join(choices.choices("ab </think>{[|", k=choices.randrange(8)))
    begun = gate.closer if opened else gate.opener + thoughts + gate.closer
    if opened:
        constraint = constraint.opened()
        begun = thoughts + gate.closer
    assert say(tiny, constraint, begun)
    said, ended = tiny.ramble(constraint, seed, 20)
    if not ended:
        return
    text = said.decode()
    parts = read(style, [begun + text], tools=tools, opened=opened)
    assert calls_in(parts)
    assert all(part.call is not None or part.thinking for part in parts), (begun, text, parts)
