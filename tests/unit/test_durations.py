from __future__ import annotations

import contextlib
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.quantities import FOR_EVER, format_duration, format_size, parse_duration, parse_size


@given(st.timedeltas(min_value=timedelta(), max_value=timedelta(days=999_999)))
def test_every_duration_survives_writing_and_reading(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration


@given(st.integers(min_value=0, max_value=10**17))
def test_every_size_survives_writing_and_reading(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.text(max_size=30))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        duration = parse_duration(text)
        assert duration == FOR_EVER or duration >= timedelta()


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("5m", timedelta(minutes=5)),
        ("1h30m", timedelta(minutes=90)),
        ("1.5h", timedelta(minutes=90)),
        ("2d", timedelta(days=2)),
        ("250ms", timedelta(milliseconds=250)),
        (" 30s ", timedelta(seconds=30)),
        ("0", timedelta()),
        ("0s", timedelta()),
        ("-1", FOR_EVER),
    ],
)
def test_durations(text: str, duration: timedelta) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a duration"),
        ("300", "no unit; write 300s"),
        ("-5m", "not a duration"),
        ("-2", "not a duration"),
        ("30m1h", "from large to small"),
        ("5m5m", "repeats a unit"),
        ("5 m", "not a duration"),
        ("5min", "not a duration"),
        ("1h30", "not a duration"),
        ("999999999999d", "too long"),
        ("٣s", "not a duration"),
    ],
)
def test_what_is_not_a_duration_says_why(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("7B", 7), ("1kib", 1024), ("0", 0)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "says"), [("", "not a size"), ("512", "no unit"), ("-1MiB", "not a size"), ("5M", "not a size")]
)
def test_what_is_not_a_size_says_why(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_size(text)


def test_a_negative_duration_of_any_length_is_for_ever() -> None:
    assert format_duration(timedelta(days=-3)) == "-1"
