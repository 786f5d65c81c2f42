"""Text that comes out of tokens is whole characters, whatever bytes the tokens cut or make up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmd.runner.text import TextStream


def cut(data: bytes, where: list[int]) -> list[bytes]:
    cuts = sorted(min(position, len(data)) for position in where)
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def run(pieces: list[bytes], stops: tuple[str, ...] = (), *, room_ran_out: bool = False) -> str:
    stream = TextStream(stops)
    text = ""
    for piece in pieces:
        text += stream.feed(piece)
        if stream.stop:
            break
    return text + stream.finish(cut=room_ran_out)


@given(st.text(), st.lists(st.integers(0, 200)))
def test_text_survives_any_cut(text: str, where: list[int]) -> None:
    assert run(cut(text.encode(), where)) == text


@given(st.binary(), st.lists(st.integers(0, 200)))
def test_any_bytes_decode_as_if_they_came_at_once(data: bytes, where: list[int]) -> None:
    assert run(cut(data, where)) == data.decode(errors="replace")


@given(st.binary(max_size=40), st.integers(0, 40))
def test_each_part_is_whole_characters(data: bytes, where: int) -> None:
    stream = TextStream(())
    for piece in cut(data, [where]):
        stream.feed(piece).encode()


def test_a_character_that_no_room_was_left_for_is_dropped() -> None:
    emoji = "🙂".encode()
    assert run([b"smile ", emoji[:2]], room_ran_out=True) == "smile "


def test_a_character_that_the_model_left_unfinished_is_invalid() -> None:
    assert run([b"smile ", "🙂".encode()[:2]]) == "smile \N{REPLACEMENT CHARACTER}"


def test_a_stop_text_of_many_bytes_is_found_byte_by_byte() -> None:
    pieces = [bytes([byte]) for byte in "ja 漢字 nein".encode()]
    assert run(pieces, ("漢字",)) == "ja "


def test_what_might_have_become_a_stop_text_is_shown_at_the_end() -> None:
    assert run([b"a<|im"], ("<|im_end|>",)) == "a<|im"
    assert run([b"a<|im"], ("<|im_end|>",), room_ran_out=True) == "a<|im"
