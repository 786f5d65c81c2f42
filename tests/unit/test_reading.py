"""Stop texts, characters and parts of an answer, in every way that its tokens may be cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.runner.answer_parser import Part
from lmd.runner.answer_style import style_of
from lmd.runner.reading import Reading
from lmd.runner.v1 import frames_pb2
from tests.support.families import THINKING

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "stop"}}\n</tool_call>'
THINKS = "<think>\nstop and think \u00e9\n</think>\n\n"


def read(
    pieces: Sequence[bytes], *stops: str, cut: bool = False, opened: bool = False
) -> tuple[str, str, list[str], str, bool]:
    """Return thoughts, text, calls, the stop text, and whether a function was called."""
    reading = Reading(style_of(THINKING), [frames_pb2.Tool(name="f")], {})
    stream = reading.stream(stops, opens_thoughts=opened)
    parts: list[Part] = []
    for piece in pieces:
        parts += stream.feed(piece)
        if stream.stop:
            break
    parts += stream.finish(cut=cut)
    return (
        "".join(part.thinking for part in parts),
        "".join(part.text for part in parts),
        [part.call.name for part in parts if part.call is not None],
        stream.stop,
        stream.called,
    )


def cuttings(text: str) -> st.SearchStrategy[list[bytes]]:
    data = text.encode()
    places = st.sets(st.integers(1, len(data) - 1), max_size=len(data))
    return places.map(lambda at: [data[a:b] for a, b in zip([0, *sorted(at)], [*sorted(at), len(data)], strict=True)])


@given(cuttings(f"{THINKS}S\u00fcre, no st\u00f6p{CALL}"))
def test_cuts_do_not_matter(pieces: list[bytes]) -> None:
    expected = "stop and think \u00e9", "S\u00fcre, no st\u00f6p", ["f"], "", True
    assert read(pieces) == expected
    # Neither in thoughts nor in a call is a stop text one.
    assert read(pieces, "stop", "</think>") == expected


@given(cuttings(f"{THINKS}Sure. stop it{CALL}"))
def test_a_stop_text_ends_what_is_said(pieces: list[bytes]) -> None:
    assert read(pieces, "stop") == ("stop and think \u00e9", "Sure. ", [], "stop", False)


@given(cuttings(f"{THINKS}so st{CALL}"))
def test_what_might_have_become_a_stop_text_comes_before_the_call(pieces: list[bytes]) -> None:
    assert read(pieces, "stop", "st<") == ("stop and think \u00e9", "so st", ["f"], "", True)


@pytest.mark.parametrize(
    ("data", "opened", "cut", "expected"),
    [
        (b"so \xc3", False, True, ("", "so", [], "", False)),
        (b"so\xc3", False, False, ("", "so\ufffd", [], "", False)),
        (b"so sto", False, False, ("", "so sto", [], "", False)),
        (b"so sto", True, True, ("so sto", "", [], "", False)),
        (b"so</think>st", True, True, ("so", "st", [], "", False)),
        (b"<think", False, True, ("", "<think", [], "", False)),
    ],
)
def test_the_end(data: bytes, opened: bool, cut: bool, expected: tuple[object, ...]) -> None:
    thinking, text, *rest = read([data], "stop", opened=opened, cut=cut)
    assert (thinking, text.rstrip(), *rest) == expected
