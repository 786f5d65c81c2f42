"""Answers on a terminal: nothing lost, nothing left behind, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.cli import markdown
from lmd.cli.bodies import RawBody, WrappedBody
from lmd.cli.live import LiveRegion
from lmd.cli.markdown import MarkdownBody, render_block, split_blocks
from lmd.cli.terminal import without_colour
from tests.support.screen import Screen

_PIECES = st.lists(
    st.sampled_from(
        ["word ", "**bold** ", "`code` ", "\n", "\n\n", "- item\n", "1. one\n", "# Title\n", "```\n", "    x\n",
         "> q\n", "| a | b |\n|--|--|\n",
         "| 1 | 2 |\n", "---\n", "<think>\n", "#", "*", "-", "ünïcödé 漢字 ", "[a](b) "]
    ),
    max_size=25,
)  # fmt: skip


class _Clock:
    """Every look at it is a second later, so that each piece is drawn."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def _shown(pieces: list[str], monkeypatch: pytest.MonkeyPatch, columns: int = 60, rows: int = 12) -> str:
    import os

    screen = Screen(columns, rows)
    monkeypatch.setattr(markdown, "terminal_size", lambda: os.terminal_size((columns, rows)))
    body = MarkdownBody(screen, _Clock())  # type: ignore[arg-type]
    body._region = LiveRegion(screen, lambda: os.terminal_size((columns, rows)))  # type: ignore[arg-type]
    for piece in pieces:
        body.feed(piece)
    body.close()
    return screen.text


@settings(max_examples=60, deadline=None)
@given(_PIECES)
def test_the_picture_does_not_depend_on_how_the_text_was_cut(pieces: list[str]) -> None:
    text = "".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        assert _shown(list(text), patch) == _shown([text], patch) == _shown(pieces, patch)


def test_blocks_are_separated_by_one_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "# Title\n\ntext\n- a\n- b\n\n1. one\n2. two\n\n```python\nx = 1\n\ny = 2\n```\n| a | b |\n|--|--|\n| 1 | 2 |\n"
    )
    assert _shown([text], monkeypatch).split("\n") == [
        "Title", "", "text", "", " • a", " • b", "", " 1. one", " 2. two", "", "  x = 1", "", "  y = 2", "",
        " a  b", " ────", " 1  2",
    ]  # fmt: skip


def test_an_answer_longer_than_the_screen_scrolls_and_is_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"line {number}" for number in range(60)]
    text = "```\n" + "\n".join(lines) + "\n```\n"
    assert [line.strip() for line in _shown(list(text), monkeypatch).split("\n")] == lines


def test_tags_and_line_breaks_stay() -> None:
    assert render_block("<think>\nroses\nviolets\n</think>", 80, colour=False) == "<think>\nroses\nviolets\n</think>\n"


def test_no_hidden_links_and_no_escapes_of_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b]8" not in render_block("[bank](http://evil.example)", 80, colour=True)
    assert _shown(["a\x1b[2Jb\x07", "\u202ec"], monkeypatch) == "a[2Jbc"


def test_colour_adds_nothing_else() -> None:
    block = "A **bold** `code` [link](x)"
    assert without_colour(render_block(block, 80, colour=True)) == render_block(block, 80, colour=False)


def test_blocks_keep_their_source() -> None:
    assert split_blocks("a\nb\n\n- x\n\n- y\n\nc") == ["a\nb", "- x\n\n- y", "c"]
    assert split_blocks("\n \n") == []


class TestLiveRegion:
    def _region(self, screen: Screen) -> LiveRegion:
        import os

        return LiveRegion(screen, lambda: os.terminal_size((screen.columns, screen.rows)))  # type: ignore[arg-type]

    def test_lines_are_replaced_and_text_above_stays(self) -> None:
        screen = Screen(20, 10)
        region = self._region(screen)
        region.draw(["one", "two"])
        region.draw(["three"], above="kept\n")
        assert screen.text == "kept\nthree"
        region.clear()
        assert screen.text == "kept"

    def test_only_the_last_lines_are_shown_where_not_all_fit(self) -> None:
        screen = Screen(20, 6)
        region = self._region(screen)
        for count in range(1, 12):
            region.draw([f"line {number}" for number in range(count)])
        assert screen.text.split("\n") == [f"line {number}" for number in (7, 8, 9, 10)]

    def test_after_a_resize_the_rows_are_counted_at_the_new_width(self) -> None:
        """A terminal that shrinks wraps what stands on it; the region must move up over all of those rows."""
        screen = Screen(20, 10)
        region = self._region(screen)
        screen.write("before\n")
        region.draw(["x" * 18])
        narrow = Screen(10, 10)  # what the terminal makes of it at ten columns
        narrow.write("before\n" + "x" * 18 + "\n")
        region._stream = narrow  # type: ignore[assignment]
        screen.columns = 10
        region.draw(["y"])
        assert narrow.text == "before\ny"


class TestBodies:
    def test_a_pipe_gets_the_text_as_it_is_and_a_last_line_feed(self) -> None:
        screen = Screen(200)
        body = RawBody(screen)
        for piece in ("  a\n\n", "b", " c"):
            body.feed(piece)
        body.close()
        assert screen.text == "  a\n\nb c"
        assert screen._column == 0

    def test_no_answer_is_no_line(self) -> None:
        screen = Screen()
        RawBody(screen).close()
        assert screen._row == 0

    @settings(deadline=None)
    @given(st.lists(st.text("ab \n", max_size=8), max_size=20))
    def test_lines_break_between_words_wherever_the_pieces_end(self, pieces: list[str]) -> None:
        def shown(parts: list[str]) -> str:
            screen = Screen(1000)
            body = WrappedBody(screen, lambda: 10)
            for part in parts:
                body.feed(part)
            body.close()
            return screen.text

        text = "".join(pieces)
        assert shown(pieces) == shown([text])
        assert shown([text]).split() == text.split() or max(map(len, text.split())) > 10
        assert all(len(line) <= max([10, *map(len, text.split())]) for line in shown([text]).split("\n"))

    def test_words_without_spaces_do_not_wait_for_ever(self) -> None:
        screen = Screen(10)
        body = WrappedBody(screen, lambda: 10)
        body.feed("漢字漢字漢字")
        assert screen.text.startswith("漢字漢字漢")
