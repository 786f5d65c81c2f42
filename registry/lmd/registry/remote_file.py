"""A file at its source, and what a reply must look like to be part of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmd.registry.digest import Digest
from lmd.registry.errors import (
    DigestMismatch,
    GgufInvalid,
    SourceDenied,
    SourceInvalid,
    SourceNotFound,
    SourceUnavailable,
)
from lmd.registry.http import Credentials, Reply
from lmd.registry.http_headers import is_encoded, parse_content_range, parse_length, sha256_from_etag
from lmd.registry.sources.refusals import refusal


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at its source and what is announced about it; None is what is not announced.

    what: names it in messages.
    validator: the value of If-Range, for sources that announce no digest: a strong ETag or a date.
    page: where people can ask for access.
    magic: how the content must start.
    """

    url: str = field(repr=False)
    what: str
    ref: str
    size_bytes: int | None = None
    sha256: Digest | None = None
    git_sha1: str | None = None
    validator: str | None = None
    credentials: Credentials | None = None
    page: str = ""
    magic: bytes = b"GGUF"

    def check_redirect(self, reply: Reply) -> None:
        """Compare what a Hub says about the file while it points to the bytes with what it said before.

        Raises:
            SourceInvalid: it contradicts itself.
        """
        announced = sha256_from_etag(reply.headers.get("x-linked-etag"))
        if self.sha256 is not None and announced is not None and announced != self.sha256.hex:
            raise SourceInvalid(f"the source announces two digests for {self.what}", ref=self.ref)
        size = parse_length(reply.headers.get("x-linked-size"))
        if size is not None:
            self._check_size(size)

    def check_whole(self, reply: Reply, max_bytes: int) -> None:
        """Check a reply to a request for the whole file.

        Raises:
            SourceError: it is refused, fails, or does not fit what was announced.
        """
        self._check_served(reply)
        if reply.status != 200:
            raise SourceInvalid("the source sends a part that was not asked for", ref=self.ref)
        length = parse_length(reply.headers.get("content-length"))
        if length is None:
            return
        self._check_size(length)
        if length > max_bytes:
            raise SourceInvalid(f"{self.what} is larger than the allowed {max_bytes} bytes", ref=self.ref)

    def check_part(self, reply: Reply, start: int, end: int) -> bool:
        """Check a reply to a request for the bytes from *start* to *end*; the source may send fewer.

        Returns False for a source that ignores ranges and sends the whole file.

        Raises:
            SourceError: it is refused, fails, or does not fit what was announced.
        """
        self._check_served(reply)
        length = parse_length(reply.headers.get("content-length"))
        if reply.status == 200:
            if length is not None:
                self._check_size(length)
            return start == 0 and end == self.size_bytes
        part = parse_content_range(reply.headers.get("content-range"))
        if part is None or part.start is None or part.end is None:
            raise SourceInvalid("the source sends a part and does not say which", ref=self.ref)
        if part.total_bytes is not None:
            self._check_size(part.total_bytes)
        if part.start != start or part.end > end:
            raise SourceInvalid(
                f"the source sends bytes {part.start}-{part.end - 1} when asked for {start}-{end - 1}", ref=self.ref
            )
        if length is not None and length != part.end - part.start:
            raise SourceInvalid("the source sends a part of another length than it says", ref=self.ref)
        return True

    def check_start(self, head: bytes) -> None:
        """Check the first bytes, so that a web page is not downloaded as a model.

        Raises:
            GgufInvalid: they are not the magic.
        """
        if not head.startswith(self.magic):
            raise GgufInvalid(f"it starts with {ascii(head[:16])[1:]}, not with {ascii(self.magic)[1:]}")

    def check_digests(self, sha256: str, git_sha1: str | None) -> Digest:
        """Compare the digests of the content, in hex, with the announced ones and return its digest.

        Raises:
            DigestMismatch: they differ.
        """
        digest = Digest.from_hex(sha256)
        if self.sha256 is not None and digest != self.sha256:
            raise DigestMismatch(expected=str(self.sha256), actual=str(digest), what=self.what)
        if self.git_sha1 is not None and git_sha1 != self.git_sha1:
            raise DigestMismatch(expected=f"git:{self.git_sha1}", actual=f"git:{git_sha1}", what=self.what)
        return digest

    def _check_served(self, reply: Reply) -> None:
        if reply.status == 416:
            raise SourceInvalid(f"{self.what} is shorter than announced", ref=self.ref)
        if reply.status not in (200, 206):
            error = refusal(
                reply.status,
                reply.headers,
                ref=self.ref,
                what=self.what,
                has_token=self.credentials is not None,
                page=self.page,
            )
            if reply.url != self.url and isinstance(error, (SourceDenied, SourceNotFound)):
                # A signed URL that has expired; the source hands out a new one.
                raise SourceUnavailable(
                    f"the storage of the source refuses {self.what} (status {reply.status})", ref=self.ref
                )
            raise error
        if is_encoded(reply.headers):
            raise SourceInvalid(f"the source sends {self.what} compressed although not asked to", ref=self.ref)
        served = reply.headers.get("etag")
        if self.validator is not None and self.validator.startswith('"') and served not in (None, self.validator):
            raise SourceInvalid(f"{self.what} changed while it was fetched", ref=self.ref, hint="try again")

    def _check_size(self, served: int) -> None:
        if self.size_bytes is not None and served != self.size_bytes:
            raise SourceInvalid(
                f"{self.what} was announced with {self.size_bytes} bytes and is served with {served}", ref=self.ref
            )
