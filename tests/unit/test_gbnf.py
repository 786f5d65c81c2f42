from __future__ import annotations

import pytest

from lmd.runner.format_error import FormatError
from lmd.runner.gbnf import Chars, Choice, Name, Repeat, Sequence, parse_gbnf
from lmd.runner.gbnf_lark import to_lark


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rule 'root'"),
        ('x ::= "a"', "no rule 'root'"),
        ('root ::= "a" b', "line 1 of the grammar: the rule 'b' does not exist"),
        ('root ::= "a"\n\nx ::= y | z', "line 3 of the grammar: the rule 'y' does not exist"),
        ('root ::= "a"\nroot ::= "b"', "line 2 of the grammar: the rule 'root' is defined again"),
        ('root = "a"', "line 1 of the grammar: '::=' must follow the name 'root'"),
        ('root ::= "a"\n| "b"', "line 2 of the grammar: a rule must begin here"),
        ('root ::= "a\n\n', "line 1 of the grammar: the literal that begins here has no closing '\"'"),
        ("root ::=\n[a-z", "line 2 of the grammar: the character class that begins here has no closing ']'"),
        ('root ::= ("a"', "line 1 of the grammar: ')' is missing"),
        ('root ::= "a")', "line 1 of the grammar: ')' cannot stand here"),
        ('root ::= "\\q"', "'\\q' is no escape"),
        ('root ::= "\\x4"', "'\\x' needs 2 hexadecimal digits"),
        ('root ::= "\\uD800"', "'\\uD800' is no character"),
        ('root ::= "\\U00110000"', "is no character"),
        ("root ::= [z-a]", "the range ends before it begins"),
        ("root ::= []", "the character class has no characters"),
        ('root ::= * "a"', "there is nothing before '*' to repeat"),
        ('root ::= "a"{2', "'}' is missing"),
        ('root ::= "a"{x}', "a number must stand here"),
        ('root ::= "a"{3,2}', "{3,2} ends before it begins"),
        ('root ::= "a"{1,9999999}', "more than 1,000,000 times"),
        ('root ::= <think> "a"', "tokens in grammars (<…>) are not supported"),
        ('root ::= "a" root', "the rule 'root' of the grammar needs itself to end"),
        ("root ::= x\nx ::= y\ny ::= x", "needs itself to end"),
        ('root ::= "' + "a" * 70_000 + '"', "bytes, but at most 65,536 are allowed"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_gbnf(text)
    assert said in str(caught.value)


def test_classes_become_sets_of_characters() -> None:
    def ranges(text: str) -> tuple[tuple[int, int], ...]:
        (node,) = parse_gbnf(f"root ::= {text}").values()
        assert isinstance(node, Chars)
        return node.ranges

    assert ranges("[a-cb-e]") == ((97, 101),)
    assert ranges("[a-]") == ((45, 45), (97, 97))
    # No NUL, as in llama.cpp; surrogates are no characters.
    assert ranges("[^\\x02-\\uFFFF]") == ((1, 1), (0x10000, 0x10FFFF))
    assert ranges(".") == ((1, 0xD7FF), (0xE000, 0x10FFFF))


def test_a_rule_ends_with_its_line_except_where_more_must_come() -> None:
    rules = parse_gbnf('root ::=\n  "a" |\n  ("b"\n  "c")* x\nx ::= "d"')
    assert rules == {
        "root": Choice((_text("a"), Sequence((Repeat(_text("bc"), 0, None), Name("x"))))),
        "x": _text("d"),
    }


def _text(text: str) -> Chars | Sequence:
    characters = tuple(Chars(((ord(character), ord(character)),)) for character in text)
    return characters[0] if len(characters) == 1 else Sequence(characters)


def test_rules_that_nothing_leads_to_are_left_out() -> None:
    assert list(parse_gbnf('root ::= x\ny ::= x\nx ::= "a"')) == ["root", "x"]


def lexemes(text: str) -> set[str]:
    lark = to_lark(parse_gbnf(text))
    return {line.split(": ", 1)[1] for line in lark.splitlines() if line.startswith("T")}


def test_a_part_without_recursion_is_one_lexeme() -> None:
    assert lexemes('root ::= item+\nitem ::= "-" [a-z]{1,9} "\\n"') == {r"/(?:\x{2d}[a-z]{1,9}\x{a}){1,}/"}


def test_a_lexeme_that_would_swallow_what_follows_is_taken_apart() -> None:
    assert lexemes('root ::= name rest\nname ::= [a-z]+\nrest ::= "(" rest ")" | "b"') == {
        r"/\x{28}/",
        r"/\x{29}/",
        "/[a-z]/",
        "/b/",
    }


def test_words_are_kept_beside_names_that_only_begin_alike() -> None:
    # After "if" comes a blank or a semicolon, with which no name goes on.
    text = 'root ::= word tail | name tail\nword ::= "if"\nname ::= [a-z]+\ntail ::= " " root | ";"'
    assert {"/[a-z]{1,}/", "/if/"} <= lexemes(text) | lexemes(text.replace("word tail", "word"))


def test_characters_beyond_ascii_count_as_alike_since_their_bytes_begin_alike() -> None:
    # After é the parser would read the first byte of è as the beginning of another é.
    assert "/\\x{e9}{1,}/" not in lexemes('root ::= "(" root ")" | x "è"\nx ::= "é"+')
