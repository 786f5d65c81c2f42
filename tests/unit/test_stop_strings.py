"""Stop texts are found wherever a stream is cut, and nothing after them is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.runner.patterns import Node
from lmd.runner.text import StopMatcher

# Few letters and short words make overlaps and near misses likely.
letters = st.text("abé", max_size=24)
stop_lists = st.lists(st.text("abé", max_size=4), max_size=4)


def reference(text: str, stops: list[str]) -> tuple[str, str]:
    """Read letter by letter; at the first letter that completes stop texts, take the longest of them."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, ""


def run(pieces: list[str], stops: list[str]) -> tuple[str, str]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        text, stop = matcher.feed(piece)
        shown += text
        if stop:
            return shown, stop
    return shown + matcher.flush(), ""


@given(letters, stop_lists, st.data())
def test_any_cut_gives_what_the_whole_text_gives(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(pieces, stops) == reference(text, stops)


@given(letters, stop_lists)
def test_shows_as_early_as_it_can(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, letter in enumerate(text, 1):
        part, stop = matcher.feed(letter)
        shown += part
        if stop:
            return
        held = text[len(shown) : end]
        assert held == "" or any(other.startswith(held) and other != held for other in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["Hello<|", "im_", "end|>more"], ["<|im_end|>"], ("Hello", "<|im_end|>")),
        (["aab", "aab!"], ["aaba"], ("", "aaba")),
        (["one\n", "\ntwo"], ["\n\n"], ("one", "\n\n")),
        (["abcd"], ["abcd", "bc"], ("a", "bc")),
        (["xab"], ["b", "ab"], ("x", "ab")),
        (["no stop<|im"], ["<|im_end|>"], ("no stop<|im", "")),
        (["text"], [""], ("text", "")),
        (["né", "e"], ["ée"], ("n", "ée")),
    ],
)
def test_examples(pieces: list[str], stops: list[str], expected: tuple[str, str]) -> None:
    assert run(pieces, stops) == expected


many_stops = st.lists(st.text("abcde\U0010ffff]^-\\", min_size=1, max_size=6), min_size=100, max_size=1024)


@given(many_stops, st.text("abcde\U0010ffff]^-\\ ", max_size=60))
def test_a_thousand_stop_texts_are_all_found(stops: list[str], text: str) -> None:
    assert run(list(text), stops) == run([text], stops) == reference(text, stops)


def test_stop_texts_that_do_not_begin_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of a thousand costs what the stream has of their beginnings: nothing, a few steps, each looked up once."""
    looked_up: list[str] = []
    find = Node._find

    def counting(node: Node, character: str) -> Node | None:
        looked_up.append(character)
        return find(node, character)

    monkeypatch.setattr(Node, "_find", counting)
    matcher = StopMatcher([f"stop {index}" for index in range(1000)])
    for _ in range(100):
        assert matcher.feed("no match here") == ("no match here", "")
    assert looked_up == []
    for _ in range(100):
        assert matcher.feed("sto!") == ("sto!", "")
    assert looked_up.count("s") == looked_up.count("t") == looked_up.count("o") == 1
    assert matcher.feed("stop 99") == ("", "stop 9")
