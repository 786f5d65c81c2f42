"""URLs: what a web server says about a file before it is fetched."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit, urlunsplit

from lmd.registry.addresses import AddressRefused, origin_of, without_secrets
from lmd.registry.cancel import CancelScope
from lmd.registry.errors import SourceInvalid
from lmd.registry.http import Credentials, Http, Reply
from lmd.registry.http_headers import parse_content_range, parse_etag, parse_length, sha256_from_etag
from lmd.registry.sources.refusals import blamed_on, refusal

#: Statuses of servers and signed URLs that answer GET but not HEAD.
_NO_HEAD = frozenset({400, 403, 405, 501})


@dataclass(frozen=True, slots=True)
class UrlFile:
    """A file on a web server; None is what the server does not say.

    validator: the value of If-Range: a strong ETag, else the date of the last change.
    sha256: from the Hub's X-Linked-ETag, in hex; other servers announce no digest.
    """

    url: str = field(repr=False)
    shown: str
    credentials: Credentials | None
    size_bytes: int | None
    validator: str | None
    sha256: str | None

    @property
    def filename(self) -> str:
        """The last part of the path."""
        return unquote(urlsplit(self.url).path.rpartition("/")[2])


class UrlSource:
    """Files on web servers. Thread-safe."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def describe(
        self, url: str, *, ref: str, fallback_credentials: Credentials | None = None, cancel: CancelScope
    ) -> UrlFile:
        """Ask for size and validator of a file; one try.

        A user name and password in *url* go to its own origin only; without them *fallback_credentials* serve.

        Raises:
            SourceError: the server refuses, fails, or must not be trusted.
            PullCancelled: cancelled.
        """
        plain, own = _split_credentials(url, ref)
        credentials = own or fallback_credentials
        shown = without_secrets(plain)
        linked: list[str] = []

        def note_link(reply: Reply) -> None:
            sha256 = sha256_from_etag(reply.headers.get("x-linked-etag"))
            if sha256 is not None:
                linked.append(sha256)

        def ask(method: str, headers: dict[str, str]) -> Reply:
            linked.clear()
            with blamed_on(ref):
                reply = self._http.follow(
                    method, plain, cancel=cancel, headers=headers, credentials=credentials, on_redirect=note_link
                )
                # The body, if any, does not matter here; a long one costs the connection.
                reply.drain()
                reply.close()
            return reply

        reply = ask("HEAD", {})
        if reply.status in _NO_HEAD:
            reply = ask("GET", {"Range": "bytes=0-0"})
        if reply.status not in (200, 206, 416):
            raise refusal(reply.status, reply.headers, ref=ref, what=shown, has_token=credentials is not None)
        size_bytes = parse_length(reply.headers.get("content-length"))
        if reply.status != 200:
            part = parse_content_range(reply.headers.get("content-range"))
            size_bytes = None if part is None else part.total_bytes
        return UrlFile(plain, shown, credentials, size_bytes, _validator(reply), linked[0] if linked else None)


def _split_credentials(url: str, ref: str) -> tuple[str, Credentials | None]:
    parts = urlsplit(url)
    if parts.username is None:
        return url, None
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    netloc = host if parts.port is None else f"{host}:{parts.port}"
    plain = urlunsplit((parts.scheme, netloc, parts.path, parts.query, ""))
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    try:
        origin = origin_of(plain)
    except AddressRefused as error:
        raise SourceInvalid(str(error), ref=ref) from error
    return plain, Credentials("Basic " + base64.b64encode(pair.encode()).decode(), origin)


def _validator(reply: Reply) -> str | None:
    etag, strong = parse_etag(reply.headers.get("etag"))
    if strong:
        return f'"{etag}"'
    return reply.headers.get("last-modified")
