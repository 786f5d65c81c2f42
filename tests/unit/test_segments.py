"""Cutting a file into segments loses and doubles nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.segments import MAX_STEP_BYTES, MIN_STEP_BYTES, Segment, Segments, step_bytes_for

ranges = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(lambda pair: (min(pair), max(pair))))


def holes(size: int, received: list[tuple[int, int]]) -> set[int]:
    return set(range(size)) - {at for start, end in received for at in range(start, end)}


@given(st.integers(0, 256), ranges, st.integers(1, 64), st.integers(1, 5), st.integers())
def test_every_missing_byte_is_fetched_once(
    size: int, received: list[tuple[int, int]], step: int, workers: int, seed: int
) -> None:
    """Several workers take and advance segments in any order, one of them calls the others at some moment."""
    rng = random.Random(seed)
    segments = Segments(size, received)
    missing = holes(size, received)
    assert segments.received_bytes == size - len(missing)
    fetched: list[int] = []
    first = segments.take()
    active: list[Segment] = [first] if first is not None else []
    is_cut = False
    while active:
        if not is_cut and rng.random() < 0.3:
            segments.cut(step)
            is_cut = True
        while is_cut and len(active) < workers and (taken := segments.take()) is not None:
            active.append(taken)
        segment = rng.choice(active)
        if segment.missing_bytes:
            count = rng.randint(1, segment.missing_bytes)
            fetched += range(segment.position, segment.position + count)
            segments.advance(segment, count)
        else:
            active.remove(segment)
            if not active and (taken := segments.take()) is not None:
                active.append(taken)
        have = set(range(size)) - (missing - set(fetched))
        front = next((at for at in range(size) if at not in have), size)
        assert segments.front == front
    assert sorted(fetched) == sorted(missing)
    assert segments.complete


def test_lowest_first_and_each_once() -> None:
    segments = Segments(100, [(20, 30)])
    segments.cut(25)
    taken = [segments.take() for _ in range(6)]
    assert [(s.start, s.end) for s in taken if s is not None] == [(0, 20), (30, 55), (55, 80), (80, 100)]
    assert taken[-1] is None
    assert segments.untaken_count == 0


def test_a_cut_leaves_the_worker_its_beginning() -> None:
    segments = Segments(100)
    segment = segments.take()
    assert segment is not None
    segments.advance(segment, 10)
    segments.cut(20)
    assert (segment.position, segment.end) == (10, 30)
    assert segments.untaken_count == 4


@pytest.mark.parametrize(("size", "step"), [(1, MIN_STEP_BYTES), (512 << 20, 16 << 20), (1 << 40, MAX_STEP_BYTES)])
def test_step_sizes(size: int, step: int) -> None:
    assert step_bytes_for(size) == step
