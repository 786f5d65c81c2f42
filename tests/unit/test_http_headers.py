"""Reply headers are written by strangers."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.http_headers import (
    ContentRange,
    git_sha1_from_etag,
    is_encoded,
    parse_content_range,
    parse_etag,
    parse_length,
    retry_after_s,
    sha256_from_etag,
)

SHA256 = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes 0-0/1", ContentRange(0, 1, 1)),
        ("bytes 5-9/10", ContentRange(5, 10, 10)),
        ("BYTES 5-9/*", ContentRange(5, 10, None)),
        ("  bytes  5-9/10 ", ContentRange(5, 10, 10)),
        ("bytes */10", ContentRange(None, None, 10)),
        ("bytes */*", ContentRange(None, None, None)),
        (None, None),
        ("", None),
        ("bytes 9-5/10", None),
        ("bytes 5-10/10", None),
        ("bytes -5-9/10", None),
        ("bytes 5-9", None),
        ("items 5-9/10", None),
        ("bytes 5-9/10, 1-2/10", None),
        ("bytes 5-9/" + "9" * 20, None),
        ("bytes \u0665-\u0669/10", None),
    ],
)
def test_content_range(value: str | None, expected: ContentRange | None) -> None:
    assert parse_content_range(value) == expected


@given(st.text(max_size=60))
def test_any_text_is_a_range_or_none(value: str) -> None:
    found = parse_content_range(value)
    if found is not None and found.start is not None and found.end is not None:
        assert 0 <= found.start < found.end
        assert found.total_bytes is None or found.end <= found.total_bytes


@given(st.integers(0, 2**60), st.integers(1, 2**60), st.integers(0, 2**60))
def test_a_range_that_is_written_is_read_back(start: int, length: int, rest: int) -> None:
    end = start + length
    assert parse_content_range(f"bytes {start}-{end - 1}/{end + rest}") == ContentRange(start, end, end + rest)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0", 0), (" 17 ", 17), ("-1", None), ("+1", None), ("1_000", None), ("1e3", None), ("", None), (None, None)],
)
def test_length(value: str | None, expected: int | None) -> None:
    assert parse_length(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('"abc"', ("abc", True)),
        ('W/"abc"', ("abc", False)),
        ("abc", ("abc", True)),
        ("W/abc", ("", False)),
        ('"a"b"', ("", False)),
        ('"abc', ("", False)),
        ('""', ("", False)),
        ('"a\r\nb"', ("", False)),
        ('"ä"', ("", False)),
        (None, ("", False)),
    ],
)
def test_etag(value: str | None, expected: tuple[str, bool]) -> None:
    assert parse_etag(value) == expected


@pytest.mark.parametrize("value", [SHA256, f'"{SHA256}"', f'"sha256:{SHA256}"', f'"{SHA256.upper()}"', f'W/"{SHA256}"'])
def test_a_linked_etag_is_a_sha256(value: str) -> None:
    assert sha256_from_etag(value) == SHA256
    assert git_sha1_from_etag(value) is None


@pytest.mark.parametrize(
    "value", [None, "", SHA256[:40], SHA256 + "0", "g" * 64, "../" * 21 + "a", "0" * 63 + "\u0660"]
)
def test_anything_else_is_none(value: str | None) -> None:
    assert sha256_from_etag(value) is None


def test_a_git_id_has_forty_digits() -> None:
    assert git_sha1_from_etag('"' + "a" * 40 + '"') == "a" * 40
    assert git_sha1_from_etag('"' + "a" * 64 + '"') is None


NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "120"}, 120.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "Sat, 21 Nov 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Sat, 21 Nov 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "Sat, 21 Nov 2026 12:00:30 -0000"}, 30.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({"ratelimit": '"api"; r=0 ; t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 55.0),
        ({"ratelimit": '"api";r=3;t=55'}, None),
        ({"ratelimit": "r=0"}, None),
        ({"retry-after": "7", "ratelimit": '"api";r=0;t=55'}, 7.0),
        ({"retry-after": "soon", "ratelimit": '"api";r=0;t=55'}, 55.0),
    ],
)
def test_how_long_to_wait(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, NOW) == expected


@given(st.text(max_size=80), st.text(max_size=80))
def test_nonsense_is_no_wait_or_a_sane_one(retry_after: str, rate_limit: str) -> None:
    wait_s = retry_after_s({"retry-after": retry_after, "ratelimit": rate_limit}, NOW)
    assert wait_s is None or wait_s >= 0


@pytest.mark.parametrize(("value", "expected"), [("gzip", True), ("identity", False), ("", False), ("br, gzip", True)])
def test_encodings(value: str, expected: bool) -> None:
    assert is_encoded({"content-encoding": value}) is expected
    assert is_encoded({}) is False
