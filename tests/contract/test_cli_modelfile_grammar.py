"""What `/save` writes is what the registry's parser reads."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmd.cli.errors import BadUsage
from lmd.cli.repl.modelfile import quote, session_modelfile
from lmd.registry.modelfile import parse_modelfile
from lmd.v1 import model_pb2

_TEXT = st.text(st.sampled_from('ab "\n\t#x') | st.characters(exclude_categories=("Cs", "Cc")), max_size=30)


@settings(deadline=None)
@given(_TEXT)
@example("")
@example('"')
@example('""')
@example('"""')
@example('say "hi"')
@example('one\n"""\ntwo')
@example('one"\ntwo"')
@example(" edge ")
@example("# not a comment\n# neither")
def test_a_quoted_text_reads_back_as_itself(text: str) -> None:
    try:
        written = quote(text)
    except BadUsage:
        assert '"\n' in text.replace(" ", "").replace("\t", "")
        return
    assert parse_modelfile(f"FROM x\nSYSTEM {written}\n").system == text


def test_a_session_reads_back_as_it_was() -> None:
    parameters = model_pb2.Parameters(temperature=0.2, use_mmap=False, stop=["</s>", " x"], seed=-1)
    messages = [
        model_pb2.Message(role="user", content="Write\n\ncode"),
        model_pb2.Message(role="assistant", content='x = """a""" + ""\nprint("x")'),
    ]
    parsed = parse_modelfile(session_modelfile("llama3:latest", system="", parameters=parameters, messages=messages))
    assert [source.value for source in parsed.from_] == ["llama3:latest"]
    assert parsed.system == ""
    assert parsed.parameters == {
        "temperature": pytest.approx(0.2),
        "use_mmap": False,
        "stop": ("</s>", " x"),
        "seed": -1,
    }
    assert [(message.role, message.content) for message in parsed.messages] == [(m.role, m.content) for m in messages]


def test_control_characters_are_left_out() -> None:
    written = quote("a\x1b[2J\r\nb")
    assert parse_modelfile(f"FROM x\nSYSTEM {written}\n").system == "a[2J\nb"
