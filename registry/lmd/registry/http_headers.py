"""Parsing the reply headers a pull depends on. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_CONTENT_RANGE = re.compile(r"\s*bytes\s+(?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)\s*", re.ASCII | re.IGNORECASE)
_RATE_LIMIT = re.compile(r'"[^"]{0,64}"\s*;\s*r\s*=\s*(\d{1,9})\s*;\s*t\s*=\s*(\d{1,9})', re.ASCII)
_DIGITS = re.compile(r"\d{1,19}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class ContentRange:
    """A Content-Range; *start* and *end* (exclusive) are None in the form of a 416 reply, *total_bytes* when "*"."""

    start: int | None
    end: int | None
    total_bytes: int | None


def parse_content_range(value: str | None) -> ContentRange | None:
    """Parse Content-Range (RFC 9110, 14.4); None when it is absent, malformed or contradicts itself."""
    match = _CONTENT_RANGE.fullmatch(value or "")
    if match is None:
        return None
    total = None if match[3] == "*" else int(match[3])
    if match[1] is None:
        return ContentRange(None, None, total)
    start, end = int(match[1]), int(match[2]) + 1
    if start >= end or (total is not None and end > total):
        return None
    return ContentRange(start, end, total)


def parse_length(value: str | None) -> int | None:
    """Parse a count of bytes; None when it is absent or not one."""
    text = (value or "").strip()
    return int(text) if _DIGITS.fullmatch(text) else None


def parse_etag(value: str | None) -> tuple[str, bool]:
    """Return the opaque part of an ETag and whether it is strong; ("", False) when absent or malformed."""
    text = (value or "").strip()
    weak = text.startswith("W/")
    text = text.removeprefix("W/")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    elif weak or '"' in text:
        return "", False
    if not text or '"' in text or not text.isascii() or not text.isprintable():
        return "", False
    return text, not weak


def sha256_from_etag(value: str | None) -> str | None:
    """Return the SHA-256 that the Hub puts into X-Linked-ETag; a git id of 40 digits is none."""
    text, _ = parse_etag(value)
    text = text.removeprefix("sha256:").lower()
    return text if len(text) == 64 and _HEX.fullmatch(text) else None


def git_sha1_from_etag(value: str | None) -> str | None:
    """Return the git object id that the Hub uses as ETag of small files."""
    text, _ = parse_etag(value)
    text = text.lower()
    return text if len(text) == 40 and _HEX.fullmatch(text) else None


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return how long a 429 or 503 reply asks to wait, in seconds; None when it does not say.

    Understands Retry-After in both forms and the Hub's `RateLimit: "api";r=0;t=55` (draft-ietf-httpapi-ratelimit-
    headers), which counts only when nothing remains.
    """
    value = (headers.get("retry-after") or "").strip()
    if _DIGITS.fullmatch(value):
        return float(value)
    if value:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            when = None
        if when is not None:
            if when.tzinfo is None:
                when = when.replace(tzinfo=UTC)
            return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())
    match = _RATE_LIMIT.search(headers.get("ratelimit") or "")
    if match is not None and int(match[1]) == 0:
        return float(match[2])
    return None


def is_encoded(headers: Mapping[str, str]) -> bool:
    """Return whether a body is compressed or otherwise not what it stands for."""
    return (headers.get("content-encoding") or "identity").strip().lower() not in ("identity", "")
