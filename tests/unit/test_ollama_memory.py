"""The numbers in which a client of `/api/generate` keeps a conversation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.conversations import Turn
from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.ollama.memory import continued, recalled, remembered

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
turns = st.lists(st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), texts), max_size=5)


@given(turns)
def test_what_is_remembered_comes_back(conversation: list[Turn]) -> None:
    numbers = remembered(conversation)
    assert all(0 <= number < 2**31 for number in numbers)
    assert recalled(numbers) == conversation


@given(turns, st.data())
def test_numbers_that_were_changed_are_refused(conversation: list[Turn], data: st.DataObject) -> None:
    numbers = remembered(conversation)
    place = data.draw(st.integers(0, len(numbers) - 1))
    changed = [*numbers]
    changed[place] += data.draw(st.integers(-(2**40), 2**40).filter(bool))
    try:
        found = recalled(changed)
    except Refusal:
        return
    # What only fills the last number up is nobody's text.
    assert found == conversation


@pytest.mark.parametrize("numbers", [[1], [128006, 882, 128007, 271], [7105892], [7105892, -1, 0, 0], [-1] * 9])
def test_tokens_of_another_server_are_refused(numbers: list[int]) -> None:
    with pytest.raises(Refusal, match="earlier answer"):
        recalled(numbers)


def test_a_conversation_goes_on() -> None:
    assert recalled(None) == recalled([]) == []
    before = [Turn("system", "be brief"), Turn("user", "hi"), Turn("assistant", "ho")]
    assert continued(before, "", "and?") == [*before, Turn("user", "and?")]
    assert continued(before, "be long", "and?") == [Turn("system", "be long"), *before[1:], Turn("user", "and?")]
    assert continued([], "", "hi") == [Turn("user", "hi")]
