"""Space promised to writers."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.errors import DiskFull
from lmd.registry.store.reservations import FLOOR_BYTES, Reservation, Reservations, Space


def ledger(free_bytes: int, total_bytes: int = 0) -> Reservations:
    return Reservations(lambda: Space(free_bytes, total_bytes), "/store")


def test_the_same_room_is_not_promised_twice() -> None:
    space = ledger(100)
    with space.reserve(60, "a"):
        with pytest.raises(DiskFull) as caught:
            space.reserve(41, "b")
        assert (caught.value.needed_bytes, caught.value.free_bytes) == (41, 40)
        assert "/store for b" in str(caught.value)
        space.reserve(40, "c").release()
    assert space.outstanding_bytes == 0


def test_a_floor_stays_free() -> None:
    with pytest.raises(DiskFull):
        ledger(1000, total_bytes=1000).reserve(981, "a")
    assert ledger(1000, total_bytes=1000).reserve(980, "a").size_bytes == 980
    huge = 1 << 50
    assert ledger(huge, total_bytes=huge).reserve(huge - FLOOR_BYTES, "a").size_bytes == huge - FLOOR_BYTES


def test_what_was_written_is_counted_once() -> None:
    """Written bytes leave the promise and show as used in the file system."""
    free_bytes = 100
    space = Reservations(lambda: Space(free_bytes, 0), "/store")
    first = space.reserve(60, "a")
    free_bytes -= 50
    first.shrink(50)
    assert first.size_bytes == 10
    second = space.reserve(40, "b")
    with pytest.raises(DiskFull):
        space.reserve(1, "c")
    first.shrink(1000)
    first.shrink(-5)
    first.release()
    second.release()
    second.release()
    assert space.outstanding_bytes == 0


def test_nonsense_is_a_defect() -> None:
    with pytest.raises(ValueError, match="-1"):
        ledger(100).reserve(-1, "a")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(-10, 80), st.booleans()), max_size=30))
def test_promises_never_exceed_the_disk(steps: list[tuple[int, int, bool]]) -> None:
    space = ledger(100)
    held: list[Reservation] = []
    for size_bytes, written_bytes, release in steps:
        try:
            held.append(space.reserve(size_bytes, "x"))
        except DiskFull:
            assert sum(each.size_bytes for each in held) + size_bytes > 100
        if held:
            held[0].shrink(written_bytes)
        if held and release:
            held.pop().release()
        assert space.outstanding_bytes == sum(each.size_bytes for each in held) <= 100
        assert all(each.size_bytes >= 0 for each in held)


def test_threads_share_the_disk() -> None:
    space = ledger(1000)
    start = threading.Barrier(8)
    won: list[Reservation] = []

    def work() -> None:
        start.wait()
        try:
            while True:
                won.append(space.reserve(7, "x"))
        except DiskFull:
            return

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1000 // 7
