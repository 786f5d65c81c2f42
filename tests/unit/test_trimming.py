"""The fewest oldest turns go, found by bisection; the system prompt and the last turn stay."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.runner.trimming import Trim, room_for_prompt
from lmd.runner.v1 import frames_pb2


def chat(turns: list[tuple[str, int]]) -> frames_pb2.Chat:
    return frames_pb2.Chat(messages=[frames_pb2.ChatMessage(role=role, content="x" * size) for role, size in turns])


def size(shown: frames_pb2.Chat) -> int:
    return sum(len(message.content) + 1 for message in shown.messages)


def search(whole: frames_pb2.Chat, room: int) -> tuple[Trim, int]:
    trim, renders = Trim(whole), 0
    while (shorter := trim.next_chat()) is not None:
        renders += 1
        fits = size(shorter) <= room
        trim.note(array("i", [0] * size(shorter)) if fits else None, size(shorter))
    return trim, renders


turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.integers(0, 20)), min_size=1, max_size=40)


@given(st.lists(st.integers(0, 10), max_size=2), turns, st.integers(1, 300))
def test_the_fewest_turns_go(systems: list[int], said: list[tuple[str, int]], room: int) -> None:
    whole = chat([("system", length) for length in systems] + said)
    trim, renders = search(whole, room)
    first = len(systems)
    cuts = [
        i
        for i in range(first + 1, first + len(said))
        if said[i - first][0] == "user" or (i == first + len(said) - 1 and said[i - first][0] != "tool")
    ]
    fitting = [
        cut for cut in cuts if sum(len(m.content) + 1 for m in [*whole.messages[:first], *whole.messages[cut:]]) <= room
    ]
    if fitting:
        assert trim.best is not None
        assert trim.best[1] == fitting[0] - first
        assert len(trim.best[0]) <= room
    else:
        assert trim.best is None
    assert renders <= 2 + len(cuts).bit_length()


def test_what_else_a_chat_says_stays() -> None:
    whole = chat([("user", 5), ("assistant", 5), ("user", 5)])
    whole.tools.add(name="f")
    whole.think, whole.template = frames_pb2.THINK_LOW, "{{ messages }}"
    shorter = Trim(whole).next_chat()
    assert shorter is not None
    assert [len(message.content) for message in shorter.messages] == [5]
    del whole.messages[:2]
    assert shorter == whole


@pytest.mark.parametrize(
    ("num_ctx", "num_predict", "room"), [(100, -1, 75), (100, 10, 90), (100, 90, 50), (100, 0, 99), (8, -1, 6)]
)
def test_the_answer_keeps_room(num_ctx: int, num_predict: int, room: int) -> None:
    assert room_for_prompt(num_ctx, num_predict) == room
