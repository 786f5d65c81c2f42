"""The door of the gateway: what every request must pass before an adapter sees it.

In this order: the name asked for (Host), the page that asks (Origin), the kind of body that a page may send, who asks,
and whether the daemon takes new work. What does not pass is answered in the shape of the path's adapter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmd.daemon.admission import Admission
from lmd.daemon.callers import user_name
from lmd.daemon.errors import Draining
from lmd.daemon.http.attribution import is_loopback
from lmd.daemon.http.bodies import LIMIT_KEY
from lmd.daemon.http.callers import CALLER_KEY
from lmd.daemon.http.config import HttpConfig
from lmd.daemon.http.connection import CONNECTION_KEY
from lmd.daemon.http.errors import retry_after, status_of
from lmd.daemon.http.origins import Hosts, Origins
from lmd.daemon.http.tokens import Tokens

log = structlog.get_logger(__name__)

#: Makes the answer to a failure at a path: the path, the status, what to tell.
Failure = Callable[[str, int, str], Response]

_LOOKING = ("GET", "HEAD")
#: What no form and no plain script of a page can send without being asked first (CORS).
_SAFE_TYPES = (b"application/json", b"application/octet-stream")
_ALLOWED_METHODS = b"GET, HEAD, POST, DELETE, OPTIONS"
_EXPOSED_HEADERS = b"x-lmd-prompt-tokens-cached, x-lmd-dropped-messages, x-lmd-dropped-tokens, x-lmd-queue-position"
_PREFLIGHT_AGE_S = b"600"
#: Headers of a proxy: whoever asks through it is not the user whose process it is.
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip")


class Peer(Protocol):
    """What the guard has to know of a connection."""

    @property
    def uid(self) -> int | None:
        """The user of this machine at its other end."""

    @property
    def gone(self) -> bool:
        """Whether it is closed."""

    @property
    def unread(self) -> bool:
        """Whether some of the request's body has not come."""

    def cut(self) -> None:
        """Close it in the middle of an answer."""


class _Refused(Exception):
    """Raised to answer a request at the door."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


class Guard:
    """Lets requests through to *app*; *serves* tells which users of this machine need no token."""

    def __init__(
        self,
        app: ASGIApp,
        failure: Failure,
        config: HttpConfig,
        admission: Admission,
        *,
        own_name: str,
        serves: Callable[[int], bool],
    ) -> None:
        self._app = app
        self._failure = failure
        self._admission = admission
        self._hosts = Hosts(own_name, config.allowed_hosts)
        self._origins = Origins(config.allowed_origins)
        self._tokens = Tokens(config.tokens_file)
        self._serves = serves
        self._require_token = config.require_token
        self._max_body_bytes = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        peer: Peer = scope[CONNECTION_KEY]
        reply = _Reply(send, peer)
        try:
            headers = _Headers(scope["headers"])
            self._check_host(scope, headers)
            if self._check_origin(scope, headers):
                reply.allow_origin(headers.origin)
            if scope["method"] == "OPTIONS":
                await _preflight(headers)(scope, receive, reply.send)
                return
            _check_type(scope, headers)
            scope[CALLER_KEY] = self._caller(headers, peer)
            scope[LIMIT_KEY] = self._max_body_bytes
            async with self._admission.admit(looks=scope["method"] in _LOOKING):
                await self._app(scope, receive, reply.send)
        except _Refused as refused:
            response = self._failure(scope["path"], refused.status, refused.message)
            response.headers.update(refused.headers)
            await response(scope, receive, reply.send)
        except Draining as error:
            if reply.started:
                # The drain time is over; without the last chunk, the client knows that this is not the end.
                reply.cut()
                return
            response = self._failure(scope["path"], status_of(error), error.message)
            response.headers["retry-after"] = retry_after(error)
            response.headers["connection"] = "close"
            await response(scope, receive, reply.send)
        except asyncio.CancelledError:
            if not peer.gone:
                raise
            # The client has left; there is nobody to tell.

    def _check_host(self, scope: Scope, headers: _Headers) -> None:
        # Elsewhere a token is needed anyway, which no page knows.
        if is_loopback(scope["server"][0]) and headers.host is not None and not self._hosts.allow(headers.host):
            raise _Refused(403, f"the host {headers.host[:100]!r} is not this machine; see `http.allowed_hosts`")

    def _check_origin(self, scope: Scope, headers: _Headers) -> bool:
        """Refuse pages that may not ask; tell whether one asks that may."""
        if headers.origin:
            if self._origins.allow(headers.origin, headers.host or ""):
                return True
            raise _Refused(403, f"pages of {headers.origin[:100]!r} may not ask; see `http.allowed_origins`")
        # A page can make a browser fetch without an Origin (an image, a form's GET): let only links through.
        if headers.fetch_site in (b"cross-site", b"same-site"):
            navigates = headers.fetch_mode == b"navigate" and scope["method"] in _LOOKING
            if not navigates:
                raise _Refused(403, "pages of other sites may not ask without saying who they are")
        return False

    def _caller(self, headers: _Headers, peer: Peer) -> str:
        name = next(filter(None, map(self._tokens.name_of, headers.tokens)), None)
        if name is not None:
            return f"token:{name}"
        challenge = {"www-authenticate": 'Bearer realm="lmd"'}
        if self._require_token:
            message = (
                "a token is needed: send `Authorization: Bearer TOKEN` with one of the daemon's `http.tokens_file`"
            )
            raise _Refused(401, message, challenge)
        if peer.uid is not None and not headers.forwarded:
            if not self._serves(peer.uid):
                message = (
                    f"user {user_name(peer.uid)} may not use this daemon: that is for who may connect to its socket; "
                    'join its group, send a token, or set `http.users = "all"`'
                )
                raise _Refused(403, message)
            return f"uid:{peer.uid}"
        who = "a caller behind a proxy" if headers.forwarded else "a caller who is not a user of this machine"
        message = f"{who} needs a token: send `Authorization: Bearer TOKEN` with one of the daemon's `http.tokens_file`"
        raise _Refused(401, message, challenge)


class _Headers:
    """The headers that the guard looks at."""

    __slots__ = ("content_type", "fetch_mode", "fetch_site", "forwarded", "host", "origin", "requested", "tokens")

    def __init__(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.host: str | None = None
        self.origin = ""
        self.fetch_site = self.fetch_mode = self.content_type = self.requested = b""
        self.forwarded = False
        self.tokens: list[str] = []
        for name, value in headers:
            if name == b"host":
                self.host = value.decode("latin-1")
            elif name == b"origin":
                self.origin = value.decode("latin-1")
            elif name == b"content-type":
                self.content_type = value.partition(b";")[0].strip().lower()
            elif name == b"sec-fetch-site":
                self.fetch_site = value
            elif name == b"sec-fetch-mode":
                self.fetch_mode = value
            elif name == b"access-control-request-headers":
                self.requested = value
            elif name == b"authorization":
                scheme, _, token = value.decode("latin-1").partition(" ")
                if scheme.lower() == "bearer":
                    self.tokens.append(token.strip())
            elif name == b"x-api-key":
                self.tokens.append(value.decode("latin-1").strip())
            elif name in _FORWARDED:
                self.forwarded = True


class _Reply:
    """Sends the answer, with the headers that the guard adds."""

    def __init__(self, send: Send, peer: Peer) -> None:
        self._send = send
        self._peer = peer
        self._more: list[tuple[bytes, bytes]] = []
        self.started = False

    def allow_origin(self, origin: str) -> None:
        """Let the page read the answer."""
        self._more += [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", _EXPOSED_HEADERS),
            (b"vary", b"Origin"),
        ]

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if not self.started:
            self.started = True
            more = self._more
            if self._peer.unread:
                # What comes of the body now is discarded; nothing can follow it.
                more = [*more, (b"connection", b"close")]
            message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff"), *more]}
        await self._send(message)

    def cut(self) -> None:
        """End the connection in the middle of the answer."""
        self._peer.cut()


def _check_type(scope: Scope, headers: _Headers) -> None:
    """Refuse what a form of a page could send."""
    if scope["method"] in _LOOKING or not (headers.origin or headers.fetch_site):
        return
    if headers.content_type not in _SAFE_TYPES:
        raise _Refused(415, "a request out of a web page needs `Content-Type: application/json`")


def _preflight(headers: _Headers) -> Response:
    response = Response(status_code=204)
    more = [(b"allow", _ALLOWED_METHODS)]
    if headers.origin:
        more += [
            (b"access-control-allow-methods", _ALLOWED_METHODS),
            (b"access-control-allow-headers", headers.requested or b"authorization, content-type"),
            (b"access-control-max-age", _PREFLIGHT_AGE_S),
            (b"vary", b"Access-Control-Request-Headers"),
        ]
    response.raw_headers.extend(more)
    return response
