"""One HTTP connection: uvicorn's protocol over llhttp, with limits, deadlines, and nothing that two readers can read in
two ways.

A request that is ambiguous or too large is answered with a plain status, and the connection is closed. So is one whose
body nobody wanted to read: what still arrives is discarded for a moment, or the reset would overtake the answer.
When a client leaves, its request is cancelled.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, NoReturn, cast

import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from lmd.daemon.http.attribution import Attributor

log = structlog.get_logger(__name__)

#: Where the connection of a request stands in its scope.
CONNECTION_KEY = "lmd.connection"

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 128
#: Connections above the limit that are told so; more are closed without a word.
MAX_REFUSED = 64
#: What chunks may cost beside their data: every size line counts, and so do the extensions that nobody uses.
CHUNK_OVERHEAD_BYTES = 16 * 1024
CHUNK_OVERHEAD_FACTOR = 16
#: How long the rest of an unwanted body is discarded.
DISCARD_S = 2.0

#: What no header has that anybody means; llhttp lets some of it pass.
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection, and all of them, may take."""

    header_timeout_s: float
    body_timeout_s: float
    slow_reader_timeout_s: float
    max_connections: int
    max_per_user: int


@dataclass
class State(ServerState):
    """What the connections share."""

    limits: Limits
    attributor: Attributor
    #: Connections of each user of this machine; None are all others.
    users: Counter[int | None] = field(default_factory=Counter)
    on_idle: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        super().__init__()
        self._date_s = 0
        self._refused_at = -60.0

    def set_date(self) -> None:
        """Keep the Date header of answers true."""
        now_s = int(time.time())
        if now_s != self._date_s:
            self._date_s = now_s
            self.default_headers = [(b"date", formatdate(now_s, usegmt=True).encode())]

    def admit(self, connection: Connection) -> bool:
        """Count a new connection, unless there are too many."""
        uid = connection.uid
        if len(self.connections) <= self.limits.max_connections and self.users[uid] < self.limits.max_per_user:
            self.users[uid] += 1
            return True
        if time.monotonic() - self._refused_at >= 60:  # not for every connection of a flood
            self._refused_at = time.monotonic()
            log.warning("http_connections_refused", uid=uid, open=len(self.connections), of_user=self.users[uid])
        return False

    def release(self, connection: Connection) -> None:
        """Count a connection no more."""
        self.users[connection.uid] -= 1
        if not self.users[connection.uid]:
            del self.users[connection.uid]


class _Refusal(Exception):
    """Raised inside the parser to end a connection with *status*."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Transport:
    """The transport as the answer to one request sees it.

    Its head goes out together with what follows at once, in one system call instead of two. Closing it lets the client
    read the answer first.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._transport = connection.transport
        self._head: bytes | None = b""
        self.is_closing = connection.transport.is_closing

    def write(self, data: bytes) -> None:
        """Write *data*; what is written first may wait for the end of the task's turn."""
        if self._head is None:
            self._transport.write(data)
        elif self._head:
            head, self._head = self._head, None
            self._transport.write(head + data)
        else:
            self._head = data
            self._connection.loop.call_soon(self._flush)

    def close(self) -> None:
        """Close once the client has what was written."""
        self._flush()
        self._connection.close_gently()

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, None
            if not self._transport.is_closing():
                self._transport.write(head)


class Connection(HttpToolsProtocol):
    """A client's connection; made by the server for each that it accepts."""

    server_state: State

    def __init__(
        self,
        config: Config,
        server_state: State,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.uid: int | None = None
        self.gone = False
        self._limits = server_state.limits
        self._admitted = False
        self._discarding = False
        self._task: asyncio.Task[None] | None = None
        self._refusal: _Refusal | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._in_headers = False
        self._in_body = False
        self._raw_bytes = 0
        self._body_bytes = 0
        self._late_headers = 0

    @property
    def unread(self) -> bool:
        """Whether some of the request's body has not come."""
        return self._in_body

    @property
    def _current(self) -> RequestResponseCycle | None:
        """The request that is being answered, or was last; None before the first."""
        return self.cycle

    # What the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Learn who connects, and whether there is room."""
        super().connection_made(cast(asyncio.Transport, transport))
        self.uid = self.server_state.attributor.uid_of_peer(transport.get_extra_info("socket"))
        if not self.server_state.admit(self):
            if len(self.connections) > self._limits.max_connections + MAX_REFUSED:
                self.transport.abort()
            else:
                self._answer_plainly(503, "too many connections")
            return
        self._admitted = True
        self._set_deadline(self.timeout_keep_alive, self.close_gently)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the request that nobody waits for any more."""
        self.gone = True
        unfinished = self._current is not None and not self._current.response_complete
        self._set_deadline(None)
        self._set_write_deadline(None)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        if self._task is not None and unfinished:
            self._task.cancel()
        if self._admitted:
            self.server_state.release(self)
        if not self.server_state.connections:
            self.server_state.on_idle()

    def data_received(self, data: bytes) -> None:
        """Parse what came, and count it."""
        if self._discarding or self.transport.is_closing():
            return
        if not self._in_headers and not self._in_body:
            # The first bytes of a request; the clock runs until its headers are whole.
            self._in_headers = True
            self._set_deadline(self._limits.header_timeout_s, self._on_header_timeout)
        self._raw_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self._discarding:
            return
        if self._in_headers and self._raw_bytes > MAX_HEADER_BYTES:
            self._refuse(_Refusal(431, "the headers are too large"))
        elif self._in_body:
            if self._raw_bytes - self._body_bytes > CHUNK_OVERHEAD_BYTES + CHUNK_OVERHEAD_FACTOR * self._body_bytes:
                self._refuse(_Refusal(400, "the chunks of the body are mostly padding"))
            else:
                self._set_deadline(self._limits.body_timeout_s, self._on_body_timeout)

    def pause_writing(self) -> None:
        """Give the client some time to read."""
        super().pause_writing()
        self._set_write_deadline(self._limits.slow_reader_timeout_s)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        if self._write_deadline is not None and not self.transport.is_closing():
            self._set_write_deadline(None)

    # What the parser tells

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._in_headers, self._in_body = True, False
        self._raw_bytes = self._body_bytes = self._late_headers = 0
        if self._deadline is None:
            self._set_deadline(self._limits.header_timeout_s, self._on_header_timeout)

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target."""
        super().on_url(url)
        if len(self.url) > MAX_HEADER_BYTES:
            self._stop(414, "the target is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; those after the body are counted and dropped, they could contradict the ones before it."""
        if self._in_body:
            self._late_headers += 1
        else:
            super().on_header(name, value)
        if len(self.headers) + self._late_headers > MAX_HEADERS:
            self._stop(431, "there are too many headers")

    def on_headers_complete(self) -> None:
        """Begin the answer, when the request can be read in one way only."""
        self._check_head()
        self._in_headers, self._in_body = False, True
        self._set_deadline(None)
        self.server_state.set_date()
        cast(dict[str, object], self.scope)[CONNECTION_KEY] = self
        before = self._current
        super().on_headers_complete()
        if self.cycle is not before:
            self.cycle.transport = _Transport(self)  # type: ignore[assignment]  # the part of it that a cycle uses

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the request is whole."""
        super().on_message_complete()
        self._in_body = self._in_headers = False
        self._set_deadline(None)

    def _check_head(self) -> None:
        """Refuse what another reader could take for another request, or for none."""
        size_bytes = hosts = lengths = encodings = 0
        encoding = b""
        for name, value in self.headers:
            size_bytes += len(name) + len(value) + 4
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                lengths += 1
            elif name == b"transfer-encoding":
                encodings += 1
                encoding = value
            if _CONTROL.search(value):
                self._stop(400, f"the header {name[:40].decode('latin-1')} has a control character in it")
        if size_bytes > MAX_HEADER_BYTES:
            self._stop(431, "the headers are too large")
        version = self.parser.get_http_version()
        http_1_0 = version == "1.0"
        if not (http_1_0 or version == "1.1"):
            self._stop(400, "the version of HTTP must be 1.1 or 1.0")
        if hosts > 1 or not (hosts or http_1_0):
            self._stop(400, "a request needs exactly one Host header")
        if lengths + encodings > 1:
            self._stop(400, "the length of the body is told twice")
        if encodings and (http_1_0 or encoding.strip(b" \t").lower() != b"chunked"):
            self._stop(400, "the only transfer-encoding that is understood is chunked, and not in HTTP/1.0")
        if not self.url.startswith(b"/") and self.url != b"*":
            self._stop(400, "the target must be a path; this is no proxy")

    def _stop(self, status: int, why: str) -> NoReturn:
        """End the connection out of a callback of the parser."""
        self._refusal = _Refusal(status, why)
        raise self._refusal

    # How requests run, and end

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Run a request; the task is remembered, so that it can be cancelled when the client leaves."""
        task = self.loop.create_task(cycle.run_asgi(app), name="http")
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)
        self._task = task

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        if self._discarding:
            self.server_state.total_requests += 1
        elif self._in_body:
            self.close_gently()
        else:
            super().on_response_complete()

    def shutdown(self) -> None:
        """Close now, or when the answer under way is done."""
        if self._current is None or self._current.response_complete:
            self.close_gently()
        else:
            self.cycle.keep_alive = False

    def cut(self) -> None:
        """Close in the middle of an answer, once the client has what was written of it."""
        if self._current is not None:
            self._current.disconnected = True
        self.close_gently()

    def close_gently(self) -> None:
        """Close once the client has what was written, or has had the time to."""
        if self._discarding or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._set_deadline(None)
        if self._in_body:
            self._discarding = True
            self.flow.resume_reading()
            self.transport.write_eof()
            self._set_write_deadline(DISCARD_S)
        else:
            self.transport.close()
            self._set_write_deadline(self._limits.slow_reader_timeout_s)

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser, or a check of ours in it, has refused."""
        refusal, self._refusal = self._refusal, None
        self._refuse(refusal or _Refusal(400, "this is not a well-formed HTTP request"))

    def _refuse(self, refusal: _Refusal) -> None:
        """End the connection; with an answer, unless another one has begun."""
        log.info("http_refused", status=refusal.status, why=str(refusal), uid=self.uid)
        cycle = self._current
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or self._in_headers:
                # An answer is under way, or, before a later request of the same packet, due; not ours to write into.
                self.transport.abort()
                return
            cycle.disconnected = True  # whatever its handler says now is not sent
        self._answer_plainly(refusal.status, str(refusal))

    def _answer_plainly(self, status: int, text: str) -> None:
        body = f"{text}\n".encode()
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: text/plain; charset=utf-8\r\n"
            + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            + body
        )
        # More may be on its way, whatever the parser thinks.
        self._in_body = True
        self.close_gently()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that had no request for too long."""
        self.close_gently()

    def _on_header_timeout(self) -> None:
        if self.flow.read_paused:
            # It is us who do not read: the answer to an earlier request comes first.
            self._set_deadline(self._limits.header_timeout_s, self._on_header_timeout)
            return
        self._refuse(_Refusal(408, "the headers took too long"))

    def _on_body_timeout(self) -> None:
        if not self._in_body:
            return
        if self.flow.read_paused or (self._current is not None and self._current.response_complete):
            # It is us who do not read.
            self._set_deadline(self._limits.body_timeout_s, self._on_body_timeout)
            return
        self._refuse(_Refusal(408, "the body took too long"))

    def _set_deadline(self, after_s: float | None, then: Callable[[], None] | None = None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if after_s is None or then is None else self.loop.call_later(after_s, then)

    def _set_write_deadline(self, after_s: float | None) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
        self._write_deadline = None if after_s is None else self.loop.call_later(after_s, self._on_write_deadline)

    def _on_write_deadline(self) -> None:
        if not self._discarding:
            log.info("http_client_does_not_read", uid=self.uid)
        self.transport.abort()
