"""Go templates mean what they mean in Go, say where they are wrong, and end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmd.gotemplate.errors import TemplateError, TemplateFailure, TemplateSyntax, TemplateTooMuch
from lmd.gotemplate.execute import execute
from lmd.gotemplate.functions import BUILTINS
from lmd.gotemplate.parser import FUNCTIONS, MAX_CHARACTERS, MAX_DEPTH, parse
from lmd.gotemplate.survey import identifiers, is_go_template
from lmd.gotemplate.values import Budget, Struct

_DATA: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data" / "go_templates.json").read_text())
VARIABLES: dict[str, object] = _DATA["variables"]


def run(template: str, *, steps: int = 100_000, size: int = 100_000, **variables: object) -> str:
    return execute(parse(template), VARIABLES | variables, Budget(steps, size))


@pytest.mark.parametrize("case", _DATA["cases"], ids=range(len(_DATA["cases"])))
def test_templates_do_what_they_do_in_go(case: dict[str, str]) -> None:
    if "output" in case:
        assert run(case["template"]) == case["output"]
        return
    expected = TemplateSyntax if case["fails"] == "compiling" else TemplateFailure
    with pytest.raises(expected):
        run(case["template"])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Newer than what the other cases were made with.
        ("{{ range 3 }}{{ . }}{{ end }}", "012"),
        ("{{ range $i, $n := 2 }}{{ $i }}{{ $n }};{{ end }}", "00;11;"),
        ("{{ with .E }}a{{ else with .S }}{{ . }}{{ end }}", "hé<l>lo"),
        ("{{ $x := 0 }}{{ range $x = .L }}{{ end }}{{ $x }}", "c"),
        # Text that is no UTF-8 ends as a replacement.
        ('{{ slice .S 0 2 }}{{ "\\xff" }}', "h\ufffd\ufffd"),
        ("{{ json (slice .S 0 2) }}", '"h\ufffd"'),
        ('{{ json "\\b\\f\\\\b<\\u2028>" }}', '"\\u0008\\u000c\\\\b\\u003c\\u2028\\u003e"'),
        ("{{ toTypeScriptType .S }}", "any"),
        ("{{ len (currentDate) }}{{ len (yesterdayDate `any`) }}{{ lt yesterdayDate currentDate }}", "1010true"),
    ],
)
def test_what_go_119_has_not(template: str, expected: str) -> None:
    assert run(template) == expected


def test_structs_have_their_fields_only() -> None:
    message = Struct("Message", {"Role": "user", "Content": "Hi", "ToolCalls": []}, json={"role": "user"})
    assert (
        run("{{ range .Ms }}{{ .Role }}{{ json . }}{{ . }}{{ end }}", Ms=[message]) == 'user{"role":"user"}{user Hi []}'
    )
    with pytest.raises(TemplateFailure, match=r"column 18: can't evaluate field Foo in type Message; it has Role,"):
        run("{{ range .Ms }}{{.Foo}}{{ end }}", Ms=[message])
    with pytest.raises(TemplateFailure, match="ToJSON"):
        run("{{ range .Ms }}{{ .ToJSON 1 }}{{ end }}", Ms=[message])


@pytest.mark.parametrize(
    ("template", "line", "column", "message"),
    [
        ("{{ if }}a{{ end }}", 1, 7, "missing value for if"),
        ("a\nb {{ .S | upper }}", 2, 11, 'function "upper" not defined'),
        ("é{{ $x }}", 1, 5, 'undefined variable "$x"'),
        ("{{ $x = 1 }}", 1, 4, 'undefined variable "$x"'),
        ("{{ range .L }}\n{{ if .S }}{{ end }}", 2, 21, "{{else}} or {{end}} is missing"),
        ("{{ if .S }}{{ else }}", 1, 22, "{{end}} is missing"),
        ("{{ end }}", 1, 4, "unexpected {{end}}"),
        ("{{ .S", 1, 1, "unclosed action"),
        ('x\n{{ "a }}', 2, 4, "unterminated quoted string"),
        ("{{ (.S }}", 1, 4, "unclosed left paren"),
        ("{{/* a }}", 1, 3, "unclosed comment"),
        ("{{ .S ; }}", 1, 7, 'unexpected ";" in operand'),
        ("{{ break }}", 1, 4, "{{break}} outside {{range}}"),
        ('{{ "\\q" }}', 1, 4, "invalid escape"),
        ("{{ 1i }}", 1, 4, "complex numbers are not supported"),
        ("{{ call .S }}", 1, 4, "the function call is not supported"),
        ("{{ js .S }}", 1, 4, "the function js is not supported"),
        ('{{ template "none" }}', 1, 4, 'template "none" is not defined'),
        ("{{ 99999999999999999999 }}", 1, 4, "integer overflow"),
        ("{{ \x01 }}", 1, 4, "U+0001"),
        ("{{ " + "(" * 200 + "1" + ")" * 200 + " }}", 1, 4 + MAX_DEPTH, f"more than {MAX_DEPTH} deep"),
        ("x" * (MAX_CHARACTERS + 1), 1, MAX_CHARACTERS + 1, f"at most {MAX_CHARACTERS} characters"),
    ],
)
def test_mistakes_and_where_they_are(template: str, line: int, column: int, message: str) -> None:
    with pytest.raises(TemplateSyntax) as caught:
        parse(template)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert message in caught.value.message
    assert str(caught.value).startswith(f"line {line}, column {column}: ")


def test_failures_say_where_they_are() -> None:
    with pytest.raises(TemplateFailure) as caught:
        run("a\n  {{ index .L 3 }}")
    assert str(caught.value) == "line 2, column 6: error calling index: index out of range: 3"


BOMBS = {
    "a loop": "{{ range 1000000000 }}{{ end }}",
    "loops in loops": "{{ range 9999 }}{{ range 9999 }}{{ range 9999 }}{{ end }}{{ end }}{{ end }}",
    "text": "{{ range 1000000 }}aaaaaaaaaaaaaaaaaaaa{{ end }}",
    "a string that doubles": '{{ $x := "aaaa" }}{{ range 100 }}{{ $x = print $x $x }}{{ end }}',
    "a string that doubles in printf": '{{ $x := "aaaa" }}{{ range 100 }}{{ $x = printf "%v%v" $x $x }}{{ end }}',
    "json of json": '{{ $x := "\\"" }}{{ range 100 }}{{ $x = json $x }}{{ end }}',
    "slices": "{{ range $.Long }}{{ $y := slice $.Long 0 9000 }}{{ end }}",
    "itself": '{{ define "t" }}{{ template "t" . }}{{ end }}{{ template "t" . }}',
    "itself twice": '{{ define "t" }}{{ template "t" . }}{{ template "t" . }}{{ end }}{{ template "t" . }}',
    "padding": '{{ printf "%9999999d" 1 }}',
    "much padding": '{{ range 1000 }}{{ printf "%9999d" 1 }}{{ end }}',
    "html": '{{ $x := "<<<<<<" }}{{ range 100 }}{{ $x = html $x }}{{ $x = print $x $x }}{{ end }}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end(bomb: str) -> None:
    with pytest.raises(TemplateFailure):
        run(BOMBS[bomb], Long=[1.0] * 10_000)


def test_what_is_used_up_is_said() -> None:
    with pytest.raises(TemplateTooMuch, match="line 2, column 10: it takes more than 1000 steps"):
        run("{{ .S }}\n{{ range 9999 }}{{ end }}", steps=1000)
    with pytest.raises(TemplateTooMuch, match="more than 10 bytes"):
        run("{{ .S }}{{ .S }}", size=10)
    assert run("{{ .S }}", size=9) == "hé<l>lo"


def test_the_parser_knows_the_functions_that_there_are() -> None:
    assert {*BUILTINS, "and", "or"} == FUNCTIONS


@pytest.mark.parametrize(
    "template",
    [
        "{{ .Prompt }}",
        "{{.}}",
        "{{- if .System }}{{ end }}",
        "{{ $x := 1 }}",
        "{{- /* c */ -}} x",
        "{{- range $i, $_ := .Messages }}{{ end }}",
        "{{\n  range .Messages }}{{ end }}",
        "a {{ json .Tools }}",
        "{{ eq .Role `user` }}",
        '{{ define "x" }}{{ end }}',
        "{{ end }}",
    ],
)
def test_go_templates_are_told_from_others(template: str) -> None:
    assert is_go_template(template)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "no action at all",
        "{{ messages[0].content }}",
        "{{ not x }}{{ (a ~ b) }}{{ ('a').b }}",
        "{{ index }}{{ 'a' if x else 'b' }}{{ end_token }}{{ range(3) }}",
        "{% if x %}{{ '{{ .Prompt }}' }}{% endif %}",
        "{# {{ .Prompt }} #}{{ x }}",
        "{{ -x }}{{ .5 }}",
    ],
)
def test_jinja_is_not_taken_for_go(template: str) -> None:
    assert not is_go_template(template)


def test_names_that_a_template_reads() -> None:
    template = (
        '{{ if .A }}{{ else }}{{ $.B.C }}{{ end }}{{ (index .D 0).E | eq (len .F) }}{{ define "x" }}{{ .G }}{{ end }}'
    )
    assert identifiers(template) == set("ABCDEFG")
    assert identifiers("{{ .A }}{{ if }}") == frozenset()


_WORDS = """{{ }} {{- -}} {{/* */}} if else end range with define template block break continue . .S .L .M.k
.Missing $ $x := = | ( ) , 1 -1 1.5 0x "a" `b` 'c' "t" true nil and or not eq lt len
index slice print printf json "%d%s" é \\ %"""
_PIECES = st.sampled_from([*_WORDS.split(), " ", "\n"])


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(_PIECES, max_size=40).map(" ".join), st.lists(_PIECES).map("".join)))
@example("{{" * 1000)
@example("{{ (" * 1000)
@example("{{ if . }}" * 1000)
@example("{{ if . }}{{ else " * 1000)
@example("{{range .L}}" * 60 + "{{end}}" * 60)
@example("{{ . | " * 500)
@example("{{.S" + ".S" * 1000 + "}}")
@example("{{ - }}")
@example("{{ 1_ }}{{ 0x_ }}")
def test_any_text_is_a_template_or_a_mistake_at_a_place(text: str) -> None:
    mistake: TemplateError | None = None
    try:
        execute(parse(text), VARIABLES, Budget(20_000, 20_000))
    except TemplateError as error:
        mistake = error
    if mistake is not None:
        lines = text.split("\n")
        assert 1 <= mistake.line <= len(lines)
        assert 1 <= mistake.column <= len(lines[mistake.line - 1]) + 1
        assert mistake.message


def test_the_deepest_template_fits_the_stack() -> None:
    depth = MAX_DEPTH // 2
    before = sys.getrecursionlimit()
    nested = "{{ if .T }}" * depth + "{{ " + "(" * depth + "len .L" + ")" * depth + " }}" + "{{ end }}" * depth
    sys.setrecursionlimit(len(_frames()) + 700)
    try:
        assert run(nested) == "3"
        assert run("{{ if .E }}a" + "{{ else if .E }}b" * (MAX_DEPTH - 1) + "{{ else }}c{{ end }}") == "c"
    finally:
        sys.setrecursionlimit(before)


def _frames() -> list[object]:
    frames: list[object] = []
    frame = sys._getframe()
    while frame is not None:
        frames.append(frame)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return frames
