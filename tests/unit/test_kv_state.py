"""A restore is believed only when the engine's own counts agree: some builds restored nothing and did not say so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lmd.runner.kv_state import SequenceState


def engine(removed: list[int], *, read: int = 10, last: int = 4, size: int = 10) -> SimpleNamespace:
    """An engine that claims to have restored what it was given."""
    return SimpleNamespace(
        llama_get_memory=lambda context: None,
        llama_state_seq_set_data=lambda context, data, length, sequence: read,
        llama_state_seq_get_size=lambda context, sequence: size,
        llama_memory_seq_pos_max=lambda memory, sequence: last,
        llama_memory_seq_rm=lambda memory, sequence, first, end: removed.append(sequence),
    )


def test_a_restore_that_adds_up_is_kept() -> None:
    removed: list[int] = []
    assert SequenceState(engine(removed), None).restore(3, memoryview(bytearray(10)), 5)
    assert removed == []


@pytest.mark.parametrize(
    "lie", [{"read": 0}, {"read": 9}, {"last": -1}, {"last": 3}, {"size": 0}, {"size": 9}], ids=str
)
def test_a_restore_that_does_not_add_up_leaves_nothing(lie: dict[str, int]) -> None:
    removed: list[int] = []
    assert not SequenceState(engine(removed, **lie), None).restore(3, memoryview(bytearray(10)), 5)
    assert removed == [3]
