from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest, ModelfileProblem, ModelfileSyntax
from lmd.registry.lm_config import Message
from lmd.registry.modelfile import (
    QUANTIZATIONS,
    Adapter,
    From,
    Modelfile,
    decode_modelfile,
    format_modelfile,
    parse_modelfile,
)
from lmd.registry.parameters import PARAMETERS, Kind


def problems(text: str) -> tuple[ModelfileProblem, ...]:
    with pytest.raises(ModelfileSyntax) as caught:
        parse_modelfile(text)
    found: tuple[ModelfileProblem, ...] = caught.value.problems
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for problem in found:
        assert 1 <= problem.line <= len(lines)
        assert problem.source_line == lines[problem.line - 1][:200]
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1
    return found


def problem(text: str) -> ModelfileProblem:
    (found,) = problems(text)
    return found


def system(text: str) -> str | None:
    return parse_modelfile(f"FROM x\n{text}").system


def test_every_directive() -> None:
    found = parse_modelfile(
        """# A pirate.
FROM llama3:8b
  # indented comment

parameter temperature 0.5
Parameter num_ctx\t8192
PARAMETER stop <|end|>
PARAMETER stop "two words"
SYSTEM You are a pirate.
TEMPLATE {% for message in messages %}{{ message.content }}{% endfor %}
LICENSE MIT
LICENSE \"\"\"
Second
license\"\"\"
MESSAGE user Hello
MESSAGE Assistant "Arr"
"""
    )
    assert found == Modelfile(
        from_=(From("llama3:8b", 2, 6),),
        parameters={"temperature": 0.5, "num_ctx": 8192, "stop": ("<|end|>", "two words")},
        system="You are a pirate.",
        template="{% for message in messages %}{{ message.content }}{% endfor %}",
        licenses=("MIT", "\nSecond\nlicense"),
        messages=(Message("user", "Hello"), Message("assistant", "Arr")),
    )
    assert (found.from_[0].line, found.from_[0].column) == (2, 6)


def test_several_from_lines() -> None:
    found = parse_modelfile("FROM ./a b.gguf\nFROM /m/mmproj.gguf\n")
    assert [source.value for source in found.from_] == ["./a b.gguf", "/m/mmproj.gguf"]
    assert [source.digest for source in found.from_] == [None, None]


def test_a_digest_after_from() -> None:
    digest = Digest.of(b"")
    assert parse_modelfile(f"FROM {digest}").from_[0].digest == digest
    assert "not a digest" in problem("FROM sha256:abc").message


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("SYSTEM   spaces around  \t", "spaces around"),
        ('SYSTEM ""', ""),
        ('SYSTEM """"""', ""),
        ('SYSTEM "quoted"', "quoted"),
        ('SYSTEM "  kept  "', "  kept  "),
        ('SYSTEM "say "hi" now"', 'say "hi" now'),
        ('SYSTEM "two\nlines"', "two\nlines"),
        ('SYSTEM """one"""', "one"),
        ('SYSTEM """a "quoted" word"""', 'a "quoted" word'),
        ('SYSTEM """\n  a\n\n"""', "\n  a\n\n"),
        ('SYSTEM """a """ b"""', 'a """ b'),
        ('SYSTEM """a"""  ', "a"),
        ('SYSTEM """a\n"""', "a\n"),
        ('SYSTEM """ ends with a quote""""', ' ends with a quote"'),
        ("SYSTEM 'single'", "'single'"),
        ("SYSTEM back\\nslash", "back\\nslash"),
        ("SYSTEM # not a comment", "# not a comment"),
        ('SYSTEM """\n# not a comment\nFROM y\n"""', "\n# not a comment\nFROM y\n"),
        ('SYSTEM say "hi"', 'say "hi"'),
        ("SYSTEM first\nSYSTEM second", "second"),
        ("SYSTEM 👩\u200d💻 naïve", "👩\u200d💻 naïve"),
    ],
)
def test_values(written: str, value: str) -> None:
    assert system(written) == value


@pytest.mark.parametrize(
    ("lines", "drafts"),
    [
        ("", None),
        ("DRAFT small", (From("small"),)),
        ("draft ./a.gguf\nDRAFT ./b.gguf", (From("./a.gguf"), From("./b.gguf"))),
        ('DRAFT ""', ()),
        ('DRAFT small\nDRAFT ""', ()),
        ('DRAFT ""\nDRAFT small', (From("small"),)),
    ],
)
def test_drafts(lines: str, drafts: tuple[From, ...] | None) -> None:
    found = parse_modelfile(f"FROM x\n{lines}")
    assert found.drafts == drafts
    assert found.sources == (From("x"), *(drafts or ()))
    assert parse_modelfile(format_modelfile(found)) == found


def test_windows_line_ends() -> None:
    found = parse_modelfile('FROM x\r\nSYSTEM """a\r\nb"""\r\n')
    assert (found.from_[0].value, found.system) == ("x", "a\nb")


def test_without_directives_there_is_nothing() -> None:
    assert parse_modelfile("FROM x") == Modelfile((From("x"),))


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("", 1, 1, "there is no FROM"),
        ("# only a comment", 1, 1, "there is no FROM"),
        ("SYSTEM x", 1, 1, "there is no FROM"),
        ("FROM x\nFRM y", 2, 1, "unknown directive `FRM` (did you mean FROM?); legal are FROM, PARAMETER"),
        ("FROM x\n  zzz", 2, 3, "unknown directive `zzz`; legal are"),
        ("FROM", 1, 1, "FROM needs a value"),
        ('FROM ""', 1, 6, "name of a model or a file"),
        ('FROM "a\nb"', 1, 6, "on one line"),
        ("FROM x\nSYSTEM", 2, 1, "SYSTEM needs a value"),
        ("FROM x\nPARAMETER", 2, 1, "PARAMETER needs a name and a value"),
        ("FROM x\nPARAMETER top_k", 2, 1, "PARAMETER needs a value"),
        ("FROM x\nPARAMETER topk 4", 2, 11, "unknown parameter `topk`; did you mean `top_k`"),
        ("FROM x\nPARAMETER top_k four", 2, 17, "a whole number, at least 0, not 'four'"),
        ("FROM x\nPARAMETER top_p  1.5", 2, 18, "a number from 0 to 1, not 1.5"),
        ("FROM x\nMESSAGE user", 2, 1, "MESSAGE needs a value"),
        ("FROM x\nMESSAGE", 2, 1, "MESSAGE needs a role and a text"),
        ("FROM x\nMESSAGE  robot hi", 2, 10, "legal are system, user, assistant"),
        ("FROM x\nDRAFT", 2, 1, "DRAFT needs a value"),
        ('FROM x\nDRAFT "a\nb"', 2, 7, "DRAFT needs the name of a model or a file, on one line"),
        ("FROM x\nDRAFT sha256:12", 2, 7, "digest"),
        ("DRAFT x", 1, 1, "there is no FROM"),
        ("FROM x\nADAPTER a.gguf much", 2, 16, "a number from -100 to 100, not `much`"),
        ("FROM x\nquantize q4", 2, 10, "`q4` is no quantization"),
        ('FROM x\nREQUIRES """1\n2"""', 2, 10, "is no version"),
        ('FROM x\nSYSTEM """never\nends\n', 2, 8, 'never ends; """ must end a line'),
        ('FROM x\nSYSTEM "never ends', 2, 8, 'never ends; " must end a line'),
        ('FROM x\nSYSTEM """', 2, 8, "never ends"),
        ('FROM x\nSYSTEM """"', 2, 8, "never ends"),
        ("FROM x\0", 1, 7, "U+0000"),
        ("FROM x\nTEMPLATE {{ .System }}{{ if }}", 2, 29, "does not compile: missing value for if"),
        ('FROM x\nTEMPLATE """a{{- if .System }}"""', 2, 31, "{{else}} or {{end}} is missing"),
        (
            'FROM x\nTEMPLATE """\nab {{ range .Messages }}\n {{ .Role | upper }}{{ end }}"""',
            4,
            13,
            '"upper" not defined',
        ),
        ("FROM x\nTEMPLATE {{ $x := 1 }}{{ $y }}", 2, 26, 'undefined variable "$y"'),
        ('FROM x\nTEMPLATE "{{ .Prompt"', 2, 11, "unclosed action"),
    ],
)
def test_mistakes(text: str, line: int, column: int, message: str) -> None:
    found = problem(text)
    assert (found.line, found.column) == (line, column)
    assert message in found.message


def test_all_mistakes_are_reported_in_order() -> None:
    found = problems("FRM x\nPARAMETER top_k x\nFROM y\nMESSAGE me hi\nSYSTEM")
    assert [item.line for item in found] == [1, 2, 4, 5]


def test_there_is_an_end_to_mistakes() -> None:
    assert len(problems("x\n" * 1000)) == 100


def test_the_error_itself_names_the_first_and_counts_the_rest() -> None:
    with pytest.raises(ModelfileSyntax, match=r"line 1: unknown directive `FRM`.*\(and 1 more\)") as caught:
        parse_modelfile("FRM x\nSYSTEM")
    assert caught.value.metadata == {"line": "1", "column": "1"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{{- bos_token -}}{% if x %}{{ iffy }}{% endif %}",
        "{{ end_token }}{{ range_of }}",
        "{{ 'a' if x else 'b' }}",
        "{{ with_tools }}",
    ],
)
def test_jinja_is_not_mistaken_for_go(template: str) -> None:
    assert parse_modelfile(f"FROM x\nTEMPLATE {template}").template == template


def test_settings_of_other_engines_are_warned_about_and_ignored() -> None:
    found = parse_modelfile("FROM x\nPARAMETER num_keep 24\nPARAMETER top_k 5")
    assert found.parameters == {"top_k": 5}
    (warning,) = found.warnings
    assert (warning.line, warning.column, warning.message) == (2, 11, "`num_keep` has no effect here")


def test_the_last_value_of_a_parameter_wins_and_stops_add_up() -> None:
    found = parse_modelfile("FROM x\nPARAMETER seed 1\nPARAMETER seed 2\nPARAMETER stop a\nPARAMETER stop b")
    assert found.parameters == {"seed": 2, "stop": ("a", "b")}
    assert "at most 1024 texts" in problem("FROM x\n" + "PARAMETER stop a\n" * 1025).message


def test_control_characters_are_dropped_with_one_warning() -> None:
    """Licences have form feeds; Ollama drops them as well."""
    found = parse_modelfile('FROM x\nSYSTEM a\x1b[2Jb\nLICENSE "MIT\x0c"\n\x07PARAMETER\x07 top_k 5')
    assert (found.system, found.licenses, found.parameters) == ("a[2Jb", ("MIT",), {"top_k": 5})
    (warning,) = found.warnings
    assert (warning.line, warning.column) == (2, 9)
    assert warning.message == "U+001B is a control character; it and 3 more are dropped"


def test_columns_are_those_of_the_file_when_characters_are_dropped() -> None:
    assert problem("FROM x\n\x07PARAMETER\x07 top_k\x07 five").column == 20


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_all_line_ends(end: str) -> None:
    found = parse_modelfile(end.join(["FROM x", 'SYSTEM """a', 'b"""', "PARAMETER top_k 5", ""]))
    assert (found.from_[0].value, found.system, found.parameters) == ("x", "a\nb", {"top_k": 5})


@pytest.mark.parametrize(
    ("argument", "path", "scale"),
    [
        ("./a.gguf", "./a.gguf", 1.0),
        ("./a.gguf 0.5", "./a.gguf", 0.5),
        ("./a.gguf\t-2", "./a.gguf", -2.0),
        ("./a.gguf .25  ", "./a.gguf", 0.25),
        ("./a.gguf 1e-2", "./a.gguf", 0.01),
        ("./a.gguf -0", "./a.gguf", 0.0),
        ("my adapter.gguf", "my adapter.gguf", 1.0),
        ("my adapter.gguf 0.5", "my adapter.gguf", 0.5),
        ('"my adapter 2"', "my adapter 2", 1.0),
        ('"my adapter 2" 0.5', "my adapter 2", 0.5),
        ('"""my "own" adapter""" 0.5', 'my "own" adapter', 0.5),
        ("./v1.gguf copy/a.gguf", "./v1.gguf copy/a.gguf", 1.0),
        ("./a b", "./a b", 1.0),
    ],
)
def test_adapters(argument: str, path: str, scale: float) -> None:
    found = parse_modelfile(f"FROM x\nADAPTER {argument}")
    assert found.adapters == (Adapter(From(path), scale),)
    assert found.sources == (From("x"), From(path))
    assert parse_modelfile(format_modelfile(found)) == found


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ('ADAPTER ""', Modelfile((From("x"),), adapters=())),
        ('ADAPTER a.gguf\nADAPTER ""', Modelfile((From("x"),), adapters=())),
        ("PROJECTOR ./p.gguf", Modelfile((From("x"),), projectors=(From("./p.gguf"),))),
        ('PROJECTOR ""', Modelfile((From("x"),), projectors=())),
        ("QUANTIZE q4_k", Modelfile((From("x"),), quantize="Q4_K_M")),
        ("quantize iq2_xxs", Modelfile((From("x"),), quantize="IQ2_XXS")),
        ("REQUIRES v0.14.0-rc1", Modelfile((From("x"),), requires="0.14.0-rc1")),
        ('REQUIRES "0.14"', Modelfile((From("x"),), requires="0.14")),
    ],
)
def test_what_is_attached_made_and_required(lines: str, found: Modelfile) -> None:
    assert parse_modelfile(f"FROM x\n{lines}") == found
    assert parse_modelfile(format_modelfile(found)) == found


def test_a_file_beyond_all_measure() -> None:
    assert "at most" in problem("FROM x\n" + "#" * (4 * 1024**2)).message


@pytest.mark.parametrize(
    "data",
    [
        "FROM ä\n".encode(),
        b"\xef\xbb\xbf" + "FROM ä\n".encode(),
        b"\xff\xfe" + "FROM ä\n".encode("utf-16-le"),
        b"\xfe\xff" + "FROM ä\n".encode("utf-16-be"),
    ],
)
def test_encodings(data: bytes) -> None:
    assert decode_modelfile(data) == "FROM ä\n"


@pytest.mark.parametrize(
    ("data", "line", "column", "encoding"),
    [
        (b"FROM x\nSYSTEM \xff", 2, 8, "UTF-8"),
        (b"\xef\xbb\xbf\xff", 1, 1, "UTF-8"),
        (b"\xff\xfeF\0\0", 1, 2, "UTF-16-LE"),
        (b"\xfe\xff\xd8\0", 1, 1, "UTF-16-BE"),
    ],
)
def test_bytes_that_are_no_text(data: bytes, line: int, column: int, encoding: str) -> None:
    with pytest.raises(ModelfileSyntax) as caught:
        decode_modelfile(data)
    (found,) = caught.value.problems
    assert (found.line, found.column) == (line, column)
    assert encoding in found.message


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_a_modelfile_or_a_typed_error(data: bytes) -> None:
    try:
        parse_modelfile(decode_modelfile(data))
    except ModelfileSyntax as error:
        assert error.problems  # noqa: PT017 - the other outcome is a success too


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["FROM x", 'SYSTEM """', '"""', '"', "PARAMETER top_k 5", "MESSAGE user", "LICENSE", ""]),
            st.text(max_size=20),
        ),
        max_size=8,
    ).map("\n".join)
)
def test_arbitrary_lines_are_a_modelfile_or_problems_within_the_text(text: str) -> None:
    try:
        found = parse_modelfile(text)
    except ModelfileSyntax:
        problems(text)
        return
    assert parse_modelfile(format_modelfile(found)) == found


# Every text but control characters; what no Modelfile can hold is left out by asking the formatter.
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20),
    st.text(alphabet='a" \n\t#', max_size=12),
)


def writable(text: str) -> bool:
    try:
        format_modelfile(Modelfile((From("x"),), system=text))
    except InvalidRequest:
        return False
    return True


WRITABLE = TEXT.filter(writable)
PARAMETER_VALUES = {
    name: (
        st.booleans()
        if parameter.kind is Kind.BOOL
        else st.lists(WRITABLE.filter(bool), min_size=1, max_size=3).map(tuple)
        if parameter.kind is Kind.TEXTS
        else st.sampled_from(parameter.choices)
        if parameter.kind is Kind.CHOICE
        else st.integers(int(parameter.minimum or 0), int(parameter.maximum or 0))
        if parameter.kind is Kind.INT
        else st.floats(parameter.minimum, parameter.maximum, exclude_min=parameter.above_minimum)
    )
    for name, parameter in PARAMETERS.items()
}
SOURCES = st.builds(
    From, WRITABLE.filter(lambda text: text != "" and "\n" not in text and not text.startswith("sha256:"))
)
MODELFILES = st.builds(
    Modelfile,
    from_=st.lists(SOURCES, min_size=1, max_size=2).map(tuple),
    drafts=st.one_of(st.none(), st.lists(SOURCES, max_size=2).map(tuple)),
    adapters=st.one_of(
        st.none(),
        st.lists(st.builds(Adapter, SOURCES, st.floats(-100, 100).map(lambda value: value or 0.0)), max_size=2)
        .filter(lambda adapters: len({adapter.source for adapter in adapters}) == len(adapters))
        .map(tuple),
    ),
    projectors=st.one_of(st.none(), st.lists(SOURCES, max_size=1).map(tuple)),
    quantize=st.one_of(st.none(), st.sampled_from(QUANTIZATIONS)),
    requires=st.one_of(st.none(), st.sampled_from(["0.14.0", "1", "0.9-rc1"])),
    parameters=st.fixed_dictionaries({}, optional=PARAMETER_VALUES),
    template=st.one_of(st.none(), WRITABLE),
    system=st.one_of(st.none(), WRITABLE),
    licenses=st.lists(WRITABLE, max_size=2).map(tuple),
    messages=st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), WRITABLE), max_size=2).map(
        tuple
    ),
)


@given(MODELFILES)
@example(Modelfile((From("x"),), system='"'))
@example(Modelfile((From("x"),), system='"""'))
@example(Modelfile((From("x"),), system='a"\nb'))
@example(Modelfile((From(" x "),), system="\n"))
@example(Modelfile((From('"x"'),), template="", licenses=("", "\t")))
@example(
    Modelfile((From("x"),), adapters=(Adapter(From("a 2")), Adapter(From('"a" 2')), Adapter(From("a.gguf b"), -1e-9)))
)
def test_formatting_and_parsing_are_inverse(modelfile: Modelfile) -> None:
    text = format_modelfile(modelfile)
    assert parse_modelfile(text) == modelfile
    assert format_modelfile(parse_modelfile(text)) == text


@pytest.mark.parametrize("text", ["a\x1bb", "a\r\nb", 'a"""\nb', "\0", "\ud800"])
def test_texts_that_no_modelfile_can_hold(text: str) -> None:
    with pytest.raises(InvalidRequest, match="SYSTEM cannot be written"):
        format_modelfile(Modelfile((From("x"),), system=text))


def test_what_parsing_refuses_is_not_written() -> None:
    with pytest.raises(InvalidRequest, match="TEMPLATE cannot be written"):
        format_modelfile(Modelfile((From("x"),), template="{{ .System }}{{ if }}"))
    with pytest.raises(InvalidRequest, match="role of a MESSAGE cannot be written"):
        format_modelfile(Modelfile((From("x"),), messages=(Message("tool", "{}"),)))


@pytest.mark.parametrize("text", ['ends with """', '"starts', 'a"\nb', "  spaces  ", "#", "", '"', '""""', "a\n\n"])
def test_texts_that_need_care(text: str) -> None:
    assert writable(text)


def test_the_format_is_what_people_write() -> None:
    text = (
        'FROM llama3\nSYSTEM """Be\nbrief."""\nPARAMETER stop <|end|>\nPARAMETER temperature 0.5\nMESSAGE user Hello\n'
    )
    assert format_modelfile(parse_modelfile(text)) == text
