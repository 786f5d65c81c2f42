"""Sizes, durations and times as people read and type them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.cli.meter import Meter
from lmd.cli.units import (
    format_ago,
    format_clock,
    format_count,
    format_elapsed,
    format_size,
    format_until,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1_185_472, "1.13 MiB"),
        (1024**2 - 1, "1 MiB"),
        (45.2 * 1024**3, "45.2 GiB"),
        (999.4 * 1024**3, "999 GiB"),
        (5000 * 1024**5, "5000 PiB"),
    ],
)
def test_sizes_have_three_digits_and_one_unit(size_bytes: float, text: str) -> None:
    assert format_size(size_bytes) == text


@settings(deadline=None)
@given(st.integers(0, 2**63))
def test_a_size_never_needs_more_than_nine_cells_below_an_exbibyte(size_bytes: int) -> None:
    if size_bytes < 1024**6:
        assert len(format_size(size_bytes)) <= 9


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (260_000, "260K"), (8_030_000_000, "8.03B"), (999_999, "1M")])
def test_counts_read_like_model_names(count: int, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "just now"), (4, "just now"), (59, "59 seconds ago"), (60, "1 minute ago"),
                          (7300, "2 hours ago"), (86400 * 15, "2 weeks ago"), (86400 * 800, "2 years ago")]
)  # fmt: skip
def test_the_past(seconds: float, text: str) -> None:
    assert format_ago(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "now"), (0.2, "now"), (0.5, "1 second from now"), (241, "4 minutes from now"),
                          (299.6, "5 minutes from now"), (270, "5 minutes from now"), (269, "4 minutes from now"),
                          (59.4, "59 seconds from now"), (59.6, "1 minute from now"), (3569, "59 minutes from now"),
                          (3570, "1 hour from now"), (86399, "1 day from now"), (5399, "1 hour from now")]
)  # fmt: skip
def test_the_future(seconds: float, text: str) -> None:
    assert format_until(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.34, "340ms"), (2.51, "2.5s"), (59.96, "1m 0s"), (200, "3m 20s"), (7500, "2h 5m")],
)
def test_elapsed(seconds: float, text: str) -> None:
    assert format_elapsed(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(9, "0:09"), (754, "12:34"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert format_clock(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("5m", 300), ("1h30m", 5400), ("-1", -1), ("-5m", -300), ("1.5h", 5400), ("250ms", 0.25), ("0", 0)],
)
def test_durations_people_type(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@settings(deadline=None)
@given(st.text(max_size=12))
def test_a_duration_parses_or_is_refused(text: str) -> None:
    try:
        parsed = parse_duration(text)
    except ValueError:
        return
    assert parsed == parsed  # not a NaN
    assert any(character.isdigit() for character in text)


@pytest.mark.parametrize("text", ["", "m", "5 minutes", "5m3", "1e5", "nan", "--1", "5mm"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_duration(text)


def test_a_meter_knows_the_rate_of_the_last_seconds_only() -> None:
    meter = Meter()
    for second in range(30):
        meter.update(second, second * 10 if second < 20 else 200 + (second - 20) * 100)
    assert meter.rate(29) == pytest.approx(100)
    assert meter.remaining_s(29, 2100) == pytest.approx(10)


def test_a_meter_says_nothing_before_it_knows_and_falls_when_nothing_comes() -> None:
    meter = Meter()
    assert meter.rate(0) is None
    meter.update(0, 500)
    assert meter.rate(0.1) is None
    meter.update(1, 1500)
    assert meter.rate(1) == pytest.approx(1000)
    assert meter.rate(10) == pytest.approx(100)


def test_a_meter_forgets_a_long_pause() -> None:
    """The average over a stall of half a minute and the seconds after it once showed 280 KiB/s for 7 MiB/s."""
    meter = Meter()
    meter.update(0, 1000)
    meter.update(30, 1000)
    meter.update(31, 2000)
    assert meter.rate(31) == pytest.approx(1000)


def test_a_meter_starts_anew_when_a_transfer_starts_anew() -> None:
    meter = Meter()
    meter.update(0, 1000)
    meter.update(1, 2000)
    meter.update(2, 0)
    meter.update(3, 300)
    assert meter.rate(3) == pytest.approx(300)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8g", 8 << 30),
        ("8 gib", 8 << 30),
        ("8GB", 8 * 10**9),
        ("1.5MiB", 3 << 19),
        ("0.5KB", 500),
        ("100B", 100),
        ("2PiB", 2 << 50),
    ],
)
def test_sizes_that_people_type(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "8", "GiB", "-1GiB", "8GiBi", "8 G iB", "1e3B", "8bb", "8GiB 1MiB", "nanB"])
def test_text_that_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text) or None):
        parse_size(text)
