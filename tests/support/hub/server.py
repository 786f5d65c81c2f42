"""The servers: listeners, state shared by both origins, and the log of requests."""

from __future__ import annotations

import secrets
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests.support.hub.content import HubFile, HubRepo
from tests.support.hub.faults import ALWAYS, Expire, Fault, FaultTable, Trigger

Role = Literal["hub", "cdn"]


@dataclass(slots=True)
class RequestRecord:
    """One request as it arrived and how it was answered; header names are in lower case."""

    role: Role
    method: str
    path: str
    query: str
    headers: dict[str, str]
    status: int = 0
    sent_bytes: int = 0
    byte_range: tuple[int, int] | None = None

    @property
    def has_token(self) -> bool:
        """Whether the request carried credentials, in a header or in the query."""
        return "authorization" in self.headers or "token" in self.query


@dataclass(slots=True)
class _FileTraffic:
    sent_bytes: int = 0
    done: set[int] = field(default_factory=set)


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], hub: HubServer, role: Role) -> None:
        from tests.support.hub.handlers import HubHandler

        super().__init__(address, HubHandler)
        self.hub = hub
        self.role = role

    def get_request(self) -> tuple[socket.socket, object]:
        request, address = super().get_request()
        if self.hub.tls is not None:
            # The handshake happens at the first read, in the connection's own thread.
            request = self.hub.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return request, address

    def process_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self.hub.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        self.hub.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are what this server is for."""


class HubServer:
    """A Hub and its CDN. Use as a context manager; every method may be called while it serves."""

    def __init__(
        self,
        *,
        port: int = 0,
        prefix: str = "",
        hub_host: str = "127.0.0.1",
        cdn_host: str = "127.0.0.2",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.tls = tls
        self.repos: dict[str, HubRepo] = {}
        self.plain: dict[str, HubFile] = {}
        self.plain_etags: dict[str, str | None] = {}
        self.tokens: set[str] = set()
        self.faults = FaultTable()
        self.requests: list[RequestRecord] = []
        self.connections: set[socket.socket] = set()
        self.stopping = threading.Event()
        self.prefix = prefix.rstrip("/")
        #: Called with each request before it is answered, from its connection's thread.
        self.on_request: Callable[[RequestRecord], None] = lambda _record: None
        self._lock = threading.Lock()
        self._signatures: dict[str, bool] = {}
        self._traffic: dict[tuple[str, str], _FileTraffic] = {}
        self._hub = _Listener((hub_host, port), self, "hub")
        self._cdn = _Listener((cdn_host, 0), self, "cdn")
        self._threads: list[threading.Thread] = []

    @property
    def endpoint(self) -> str:
        """The Hub's base URL: the value of HF_ENDPOINT."""
        host, port = self._hub.server_address[:2]
        return f"{self._scheme}://{host!s}:{port}{self.prefix}"

    @property
    def cdn(self) -> str:
        """The CDN's base URL."""
        host, port = self._cdn.server_address[:2]
        return f"{self._scheme}://{host!s}:{port}"

    @property
    def _scheme(self) -> str:
        return "https" if self.tls is not None else "http"

    def start(self) -> HubServer:
        """Serve in threads until `stop`."""
        for listener in (self._hub, self._cdn):
            thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def stop(self) -> None:
        """Close the listeners and every connection."""
        self.stopping.set()
        for listener in (self._hub, self._cdn):
            listener.shutdown()
            listener.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, Path | bytes],
        *,
        private: bool = False,
        gated: bool = False,
        license: str | None = "mit",
    ) -> HubRepo:
        """Add a repository with one commit."""
        repo = HubRepo(repo_id, private=private, gated=gated, license=license)
        repo.commit(HubFile.of(name, content) for name, content in files.items())
        self.repos[repo_id] = repo
        return repo

    def add_plain(self, name: str, content: Path | bytes, *, etag: str | None = None) -> str:
        """Serve *content* as an ordinary web server would, below `/plain/`; returns its URL."""
        self.plain[name] = HubFile.of(name, content)
        self.plain_etags[name] = etag
        return f"{self.endpoint}/plain/{name}"

    def fault(self, repo: str, filename: str | None, fault: Fault, *, times: int = ALWAYS) -> None:
        """Switch on *fault* for a file, or for all of a repository; "plain" names the ordinary files."""
        self.faults.add(repo, filename, fault, times)

    def log(self, record: RequestRecord) -> None:
        """Add to the request log."""
        with self._lock:
            self.requests.append(record)

    def data_requests(self, filename: str) -> list[RequestRecord]:
        """Return the GET requests that sent bytes of *filename*."""
        with self._lock:
            return [r for r in self.requests if r.method == "GET" and r.path.endswith(filename) and r.status < 300]

    def sign(self) -> str:
        """Return a signature that the CDN accepts until it expires."""
        signature = secrets.token_hex(16)
        with self._lock:
            self._signatures[signature] = True
        return signature

    def accepts(self, signature: str) -> bool:
        """Return whether a signature is known and has not expired."""
        with self._lock:
            return self._signatures.get(signature, False)

    def expire_signatures(self) -> None:
        """Refuse every URL signed so far."""
        with self._lock:
            self._signatures = dict.fromkeys(self._signatures, False)

    def bytes_until_event(self, repo: str, filename: str, limit: int) -> int:
        """Return how many of the next *limit* bytes may be sent before a trigger of this file is due."""
        pending = self._pending(repo, filename)
        with self._lock:
            sent = self._traffic.setdefault((repo, filename), _FileTraffic()).sent_bytes
        return max(1, min([limit, *(at - sent for at, _ in pending if at > sent)]))

    def count_sent(self, repo: str, filename: str, nbytes: int) -> None:
        """Add to the traffic of a file and fire what is due."""
        pending = self._pending(repo, filename)
        due: list[Fault] = []
        with self._lock:
            traffic = self._traffic.setdefault((repo, filename), _FileTraffic())
            traffic.sent_bytes += nbytes
            for at, fault in pending:
                if at <= traffic.sent_bytes and id(fault) not in traffic.done:
                    traffic.done.add(id(fault))
                    due.append(fault)
        for fault in due:
            if isinstance(fault, Expire):
                self.expire_signatures()
            elif isinstance(fault, Trigger):
                fault.action()

    def sent_bytes(self, repo: str, filename: str) -> int:
        """Return the bytes of a file sent so far, over all connections."""
        with self._lock:
            return self._traffic.setdefault((repo, filename), _FileTraffic()).sent_bytes

    def _pending(self, repo: str, filename: str) -> list[tuple[int, Fault]]:
        found: list[tuple[int, Fault]] = [(f.after_bytes, f) for f in self.faults.all(Expire, repo, filename)]
        found += [(f.after_bytes, f) for f in self.faults.all(Trigger, repo, filename)]
        return found
