"""Grammars in GBNF mean what they mean to llama.cpp, whose own parser is asked."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from lmd.runner.gbnf import parse_gbnf
from lmd.runner.gbnf_lark import to_lark
from lmd.runner.structured import FormatError
from tests.support.formats import Tokenizer
from tests.support.shared_models import shared_model
from tests.support.tiny_models import make_tiny_llama

JSON = r"""
# Any object; after each part there may be blanks.
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            pair
    ("," ws pair)*
  )? "}" ws
pair   ::= string ":" ws value
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,3})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
SUMS = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
CHESS = r"""
root    ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")+
move    ::= (pawn | nonpawn | castle) [+#]?
nonpawn ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn    ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle  ::= "O-O" "-O"?
"""
ITEMS = r"""root ::= item+
item ::= "- " [^\r\n\x0b\x0c\x85\u2028\u2029]+ "\n" """
KANA = 'root ::= kana{2,} ([、-〾] kana+)* "\\u3002"\nkana ::= [ぁ-ゟ] | [ァ-ヿ]\n'
STATEMENTS = r"""
root       ::= statement+
statement  ::= "if" ws "(" ws expression ")" ws statement ("else" ws statement)?
             | name "=" ws expression ";" ws | "return" ws1 expression ";" ws
expression ::= term (("+" | "-" | "<=" | "<" | "==") ws term)*
term       ::= name | number | name "(" ws (expression ("," ws expression)*)? ")" ws | "-" term
name       ::= [a-zA-Z_] [a-zA-Z_0-9]* ws
number     ::= [0-9]+ ws
ws         ::= [ \t\n]*
ws1        ::= [ \t\n]+
"""
# llama.cpp wants `|` at the end of the line.
STATEMENTS = re.sub(r"\n +\|", " |\n  ", STATEMENTS)
GRAMMARS = {"json": JSON, "sums": SUMS, "chess": CHESS, "items": ITEMS, "kana": KANA, "statements": STATEMENTS}


class Engine:
    """llama.cpp's own reading of a grammar."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._llama: Any = tokenizer.llama
        self._size = tokenizer.vocab.size
        self.sampler = self._llama.llama_sampler_init_grammar(tokenizer.vocab.handle, text.encode(), b"root")
        self._data = (self._llama.llama_token_data * self._size)()
        self._view = np.frombuffer(self._data, dtype=[("id", "i4"), ("logit", "f4"), ("p", "f4")])

    def allowed(self) -> set[int]:
        self._view["id"] = np.arange(self._size)
        self._view["logit"] = 1
        candidates = self._llama.llama_token_data_array(self._data, self._size, -1, False)
        self._llama.llama_sampler_apply(self.sampler, ctypes.byref(candidates))
        return set(np.flatnonzero(self._view["logit"] == 1).tolist())

    def accept(self, token: int) -> None:
        self._llama.llama_sampler_accept(self.sampler, token)

    def close(self) -> None:
        if self.sampler:
            self._llama.llama_sampler_free(self.sampler)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf"))


@pytest.fixture(scope="module")
def plain(tiny: Tokenizer) -> set[int]:
    """Tokens that both read alike. llama.cpp lets bytes pass that begin no character."""
    return {token for token in range(tiny.vocab.size) if _is_plain(tiny.vocab.piece(token))} | tiny.ends


def _is_plain(piece: bytes | None) -> bool:
    if not piece:
        return False
    return piece in (b"\xc3", b"\xa8", b"\xa9", b"\xaa") or (piece.isascii() and piece != b"\0")


def compare(tiny: Tokenizer, plain: set[int], text: str, pick: Iterator[int], steps: int) -> bool:
    """Go through a grammar with both; at each step they must allow the same. Returns whether llama.cpp takes it."""
    engine = Engine(tiny, text)
    try:
        if not engine.sampler:
            return False
        constraint = tiny.compile(gbnf=text)
        for _ in range(steps):
            expected = engine.allowed() & plain
            mine = {token for token in plain - tiny.ends if constraint.copy().accept(token)}
            mine |= tiny.ends if constraint.accepting else set()
            assert mine == expected
            # The mask may be narrower, where text is demanded that has its own tokens, but never wider.
            masked = set(tiny.allowed(constraint)) & plain
            assert masked <= expected
            going = sorted(expected - tiny.ends)
            assert constraint.complete == (not going and bool(expected))
            if not going:
                break
            token = going[next(pick) % len(going)]
            assert constraint.accept(token)
            engine.accept(token)
    finally:
        engine.close()
    return True


CHARACTERS = st.sampled_from(
    ['"a"', '"ab"', '"bc"', '"é\\n"', '"\\xe8"', "[a-c]", "[ab]", "[^a]", "[^a-c\\n]", ".", "[é-ë]"]
)
REPEATED = st.tuples(CHARACTERS, st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,3}", "{2,}"])).map("".join)


def sequences(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(items, min_size=1, max_size=3).map(" ".join)


def choices(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(sequences(items), min_size=1, max_size=3).map(" | ".join)


def items_with(*names: str) -> st.SearchStrategy[str]:
    leaves = REPEATED | st.sampled_from(names) if names else REPEATED
    return st.recursive(leaves, lambda inner: choices(inner).map(lambda text: f"({text})"), max_leaves=6)


def grammar(root: str, x: str, y: str) -> str:
    # The last alternative of each ends, so that no rule is endless: llama.cpp would let a model begin those.
    return f'root ::= {root} | "c"\nx ::= {x} | "c"\ny-y ::= {y} | "c"\n'


@settings(max_examples=200, deadline=None)
@given(
    # Without recursion, with which llama.cpp may take for ever.
    text=st.builds(grammar, choices(items_with("x", "y-y")), choices(items_with("y-y")), choices(items_with())),
    picks=st.lists(st.integers(0, 10_000), min_size=8, max_size=8),
)
def test_random_grammars_mean_what_they_mean_to_llama_cpp(
    tiny: Tokenizer, plain: set[int], text: str, picks: list[int]
) -> None:
    try:
        assert compare(tiny, plain, text, iter(picks), steps=8)
    except FormatError:
        # Too ambiguous.
        reject()


ANY_ITEM = items_with("root", "x", "y-y")


@settings(max_examples=300, deadline=None)
@given(
    text=st.builds(grammar, choices(ANY_ITEM), choices(ANY_ITEM), choices(ANY_ITEM)),
    picks=st.lists(st.integers(0, 10_000), min_size=8, max_size=8),
)
def test_lexemes_change_nothing_about_what_a_grammar_means(tiny: Tokenizer, text: str, picks: list[int]) -> None:
    rules = parse_gbnf(text)
    one = tiny.parser_of(to_lark(rules))
    other = tiny.parser_of(to_lark(rules, characters_only=True))
    # Tokens of which the parts are as many different ones as possible; all of them would take long.
    tokens = sorted({token for token in range(tiny.vocab.size) if _is_plain(tiny.vocab.piece(token))})[:200]
    for pick in picks:
        assert one.is_accepting() == other.is_accepting()
        fitting = [token for token in tokens if one.validate_tokens([token])]
        assert fitting == [token for token in tokens if other.validate_tokens([token])]
        assert not one.is_error()
        assert not other.is_error()
        if not fitting:
            break
        token = fitting[pick % len(fitting)]
        assert one.consume_token(token)
        assert other.consume_token(token)


@pytest.mark.parametrize("name", GRAMMARS)
def test_grammars_that_people_write_mean_the_same(tiny: Tokenizer, plain: set[int], name: str) -> None:
    for seed in range(3):
        picks = np.random.default_rng(seed).integers(0, 10_000, size=25).tolist()
        assert compare(tiny, plain, GRAMMARS[name], iter(picks), steps=25)


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('root ::= [a-z]+ "b"', "aab", "aac"),
        ('root ::= ("a" | "ab") "bc"', "abc", "ab"),
        ('root ::= "a" root "a" | "b" root "b" | [ab]?', "abba", "abb"),
        ('root ::= root "+" root | [0-9]', "1+2+3", "1+"),
        ('root ::= ("a"? "b"?)* "c"', "abbac", "ab"),
        ('root ::= .{2} "\\n"', "a\n\n", "a\n"),
        ("root ::= [\\]\\[-a] [a-]", "]-", "b-"),
        ('root ::= [&&--~~] "/" "\\\\"', "&/\\", "b/"),
        ('root ::= "\\x41\\u00e9\\U0001F600"', "Aé\U0001f600", "A"),
        ('root ::= "a" {2} "b" { 1 , 2 }', "aabb", "ab"),
        ('root ::=\n  "a"\n\n# next\r\n', "a", ""),
        ('root ::= ("a" |\n "b"\n)+ # both', "ab", "c"),
        ('root ::= x y{0,0}\nx ::= "1"\ny ::= "2"', "1", "12"),
    ],
)
def test_what_a_grammar_matches(tiny: Tokenizer, text: str, good: str, bad: str) -> None:
    for sample, expected in ((good, True), (bad, False)):
        constraint = tiny.compile(gbnf=text)
        taken = all(constraint.accept(token) for token in tiny.tokenize(sample))
        assert (taken and constraint.accepting) is expected, sample


def test_rules_that_cannot_end_are_never_begun(tiny: Tokenizer) -> None:
    constraint = tiny.compile(gbnf='root ::= "a" | "b" endless\nendless ::= "c" endless\n')
    assert set(tiny.allowed(constraint)) <= tiny.spell("a")


def test_json_from_a_grammar_is_json(tiny: Tokenizer) -> None:
    ended = 0
    for seed in range(20):
        text, whole = tiny.ramble(tiny.compile(gbnf=JSON), seed, length=40)
        ended += whole
        if whole:
            assert isinstance(json.loads(text), dict)
    assert ended


def test_a_real_tokenizer_follows_a_grammar(plain: set[int]) -> None:
    tokenizer = Tokenizer(shared_model("vocab/ggml-vocab-llama-bpe.gguf"))
    for text in ("abc+12*(x-y)=14\n", "a=b\nc=d\n"):
        constraint = tokenizer.compile(gbnf=SUMS)
        for token in tokenizer.tokenize(text):
            assert token in tokenizer.allowed(constraint)
            assert constraint.accept(token)
        assert constraint.accepting
        assert not constraint.complete


@pytest.mark.parametrize(
    "text",
    [
        'root ::= (("a"{1000}){1000}){1000}',
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40 ::= "a"\n',
        'root ::= ("a" | root "b"){1000000}',
        "root ::= " + "(" * 100 + '"a"' + ")" * 100,
        "root ::= " + 'x"' * 40_000,
        'root ::= "a"' + "*" * 60_000,
        "root ::= " + " | ".join(f"r{i}" for i in range(2001)) + "\n" + "".join(f'r{i} ::= "a"\n' for i in range(2001)),
    ],
    ids=["counts", "doubling", "count of recursion", "groups", "size", "repetitions", "rules"],
)
def test_a_hostile_grammar_is_refused(tiny: Tokenizer, text: str) -> None:
    with pytest.raises(FormatError):
        tiny.compile(gbnf=text)
    assert tiny.compile(gbnf='root ::= "a"').accept(tiny.tokenize("a")[0])
