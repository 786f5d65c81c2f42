"""The journal of an ingest and the arithmetic of ranges."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.store.journal import (
    CHECKPOINT,
    NOTE,
    RECORD_BYTES,
    JournalHeader,
    encode_header,
    encode_journal,
    encode_record,
    read_header,
    replay,
)
from lmd.registry.store.ranges import RangeSet

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=12
)
HEADERS = st.builds(JournalHeader, st.text(max_size=40), st.none() | st.integers(0, 1 << 60), st.just("this boot"))


def members(ranges: list[tuple[int, int]]) -> set[int]:
    return {byte for start, end in ranges for byte in range(start, end)}


@given(RANGES)
def test_a_range_set_is_the_set_of_its_bytes(ranges: list[tuple[int, int]]) -> None:
    found = RangeSet(ranges)
    listed = found.list()
    assert members(listed) == members(ranges)
    assert found.total_bytes == len(members(ranges))
    assert all(before[1] < after[0] for before, after in pairwise(listed)), "sorted and apart"


@given(RANGES, st.integers(0, 80))
def test_clipping(ranges: list[tuple[int, int]], size_bytes: int) -> None:
    assert members(RangeSet(ranges).clip(size_bytes).list()) == {byte for byte in members(ranges) if byte < size_bytes}


@given(HEADERS, RANGES, RANGES)
def test_what_is_written_is_read(
    header: JournalHeader, durable: list[tuple[int, int]], rest: list[tuple[int, int]]
) -> None:
    data, records, notes = encode_journal(header, durable, rest)
    assert len(data) == len(encode_header(header)) + records * RECORD_BYTES
    assert notes == len(durable) + len(rest)
    found = replay(data, "this boot")
    assert found is not None
    assert found.header == header
    assert found.durable.list() == RangeSet(durable).list()
    assert found.received.list() == RangeSet(durable + rest).list()
    later = replay(data, "another boot")
    assert later is not None
    assert later.received.list() == RangeSet(durable).list()


@given(HEADERS, RANGES, RANGES, st.data())
def test_a_torn_tail_is_ignored(
    header: JournalHeader, durable: list[tuple[int, int]], rest: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Cut anywhere, and whatever lies behind the cut, the journal tells a prefix of what was noted."""
    whole, _, _ = encode_journal(header, durable, rest)
    start = len(encode_header(header))
    cut = data.draw(st.integers(start, len(whole)))
    tail = data.draw(st.sampled_from([b"", b"\0" * 4096, b"\xff" * 50, whole[start:][:50]]))
    found = replay(whole[:cut] + tail, "this boot")
    assert found is not None
    assert members(found.received.list()) <= members(durable + rest)
    kept = (cut - start) // RECORD_BYTES
    entries: list[tuple[int, int] | None] = [*durable, *([None] if durable else []), *rest]
    promised = [entry for entry in entries[:kept] if entry is not None]
    assert members(found.received.list()) >= members(promised)


@given(st.binary(max_size=200))
def test_garbage_is_no_journal(data: bytes) -> None:
    assert replay(data, "this boot") is None


@given(HEADERS, RANGES, st.data())
def test_one_flipped_bit_never_adds_a_byte(
    header: JournalHeader, ranges: list[tuple[int, int]], data: st.DataObject
) -> None:
    whole = bytearray(encode_journal(header, ranges, [])[0])
    position = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[position // 8] ^= 1 << (position % 8)
    found = replay(bytes(whole), "this boot")
    assert found is None or members(found.received.list()) <= members(ranges)


def test_a_record_counts_only_at_its_position() -> None:
    header = encode_header(JournalHeader("k", None, "boot"))
    moved = header + encode_record(1, NOTE, 0, 10)
    found = replay(moved, "boot")
    assert found is not None
    assert found.received.list() == []


def test_a_checkpoint_covers_only_the_notes_it_counts() -> None:
    """Other threads note while the data is being synced; those bytes were perhaps not part of it."""
    data = encode_header(JournalHeader("k", None, "boot"))
    for position, record in enumerate([(NOTE, 0, 10), (NOTE, 20, 10), (CHECKPOINT, 1, 0), (NOTE, 40, 10)]):
        data += encode_record(position, *record)
    found = replay(data, "later boot")
    assert found is not None
    assert found.received.list() == [(0, 10)]


def test_records_that_make_no_sense_end_the_journal() -> None:
    header = encode_header(JournalHeader("k", None, "boot"))
    for record in [(NOTE, (1 << 64) - 1, 1), (CHECKPOINT, 1, 0), (7, 0, 0)]:
        found = replay(header + encode_record(0, *record) + encode_record(1, NOTE, 0, 10), "boot")
        assert found is not None
        assert found.received.list() == []


def test_headers_of_the_wrong_shape_are_refused() -> None:
    good = JournalHeader("k", 7, "boot")
    assert read_header(encode_header(good)) == (good, len(encode_header(good)))
    assert read_header(encode_header(good)[:-1]) is None
    assert read_header(encode_header(JournalHeader("k", "7", "boot"))) is None  # type: ignore[arg-type]  # the point
    assert read_header(encode_header(JournalHeader(None, 7, "boot"))) is None  # type: ignore[arg-type]  # the point
