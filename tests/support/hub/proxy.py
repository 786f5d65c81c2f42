"""A forward proxy on loopback, for tests of proxy settings: plain requests and CONNECT tunnels."""

from __future__ import annotations

import base64
import select
import socket
import socketserver
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from urllib.parse import urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _admit(self) -> bool:
        self.server.proxy.targets.append(self.path)
        wanted = self.server.proxy.authorization
        if wanted is None or self.headers.get("Proxy-Authorization") == wanted:
            return True
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_CONNECT(self) -> None:
        if not self._admit():
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self.send_response(200)
            self.end_headers()
            self._splice(upstream)
        self.close_connection = True

    def do_GET(self) -> None:
        if not self._admit():
            return
        target = urlsplit(self.path)
        path = target.path + (f"?{target.query}" if target.query else "")
        lines = [f"{self.command} {path} HTTP/1.1", "Connection: close"]
        lines += [
            f"{k}: {v}" for k, v in self.headers.items() if k.lower() not in ("connection", "proxy-authorization")
        ]
        with socket.create_connection((target.hostname or "", target.port or 80)) as upstream:
            upstream.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
            self._splice(upstream)
        self.close_connection = True

    do_HEAD = do_GET

    def _splice(self, upstream: socket.socket) -> None:
        pairs = {self.connection: upstream, upstream: self.connection}
        while True:
            for source in select.select(list(pairs), [], [])[0]:
                data = source.recv(1 << 16)
                if not data:
                    return
                pairs[source].sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, proxy: ForwardProxy) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy = proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are expected."""


class ForwardProxy:
    """A running proxy; *targets* logs what was asked of it."""

    def __init__(self, *, user: str = "", password: str = "") -> None:
        self.targets: list[str] = []
        pair = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.authorization = f"Basic {pair}" if user else None
        self._server = _Server(self)
        userinfo = f"{user}:{password}@" if user else ""
        self.url = f"http://{userinfo}127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> ForwardProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        with suppress(OSError):
            self._server.server_close()
        self._thread.join()
