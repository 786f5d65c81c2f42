"""How the gateway is asked when it is measured: as few client instructions as Python allows."""

from __future__ import annotations

import contextlib
import http.client
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from bench.answers import Answer, now_s
from bench.our_server import MODEL, OurServer

_TIMEOUT_S = 600.0


class Gateway:
    """The daemon of *server*, asked through Ollama's API over connections that stay, one for each thread."""

    name = "gateway"

    def __init__(self, server: OurServer) -> None:
        self._server = server
        url = urlsplit(server.product.json("status")["http"])
        if url.hostname is None or url.port is None:
            raise RuntimeError("the daemon has no HTTP gateway")
        self.host, self.port = url.hostname, url.port
        self._local = threading.local()

    @property
    def pids(self) -> list[int]:
        return self._server.pids

    @property
    def model_pids(self) -> list[int]:
        return self._server.model_pids

    def ask(
        self,
        prompt: str,
        tokens: int,
        *,
        stop: threading.Event | None = None,
        on_text: Callable[[], None] | None = None,
    ) -> Answer:
        body = generate_body(prompt, tokens, num_ctx=self._server.num_ctx)
        connection = self._connection()
        answer = Answer(now_s())
        connection.request("POST", "/api/generate", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise RuntimeError(f"the gateway answers {response.status}: {response.read(500)!r}")
        for line in response:
            event = json.loads(line)
            if "error" in event:
                raise RuntimeError(f"the gateway answers: {event['error']}")
            if event["response"]:
                answer.arrivals_s.append(now_s())
                if on_text is not None:
                    on_text()
            if event["done"]:
                answer.complete = True
                answer.prompt_tokens = event["prompt_eval_count"]
                answer.generated_tokens = event["eval_count"]
            elif stop is not None and stop.is_set():
                connection.close()
                break
        answer.end_s = now_s()
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection(self.host, self.port, timeout=_TIMEOUT_S)
        return connection


def generate_body(prompt: str, tokens: int, *, num_ctx: int, **more: object) -> bytes:
    """Return the request that corresponds to `OurServer.ask`."""
    options = {"temperature": 0, "num_ctx": num_ctx, "num_predict": tokens}
    body = {"model": MODEL, "prompt": prompt, "raw": True, "stream": True, "keep_alive": -1, "options": options}
    return json.dumps({**body, **more}).encode()


def requests_per_s(port: int, path: str, *, connections: int, duration_s: float) -> float:
    """Return how many times a second *path* is answered to clients that ask again as soon as they have an answer."""
    request = _get(port, path)
    selector = selectors.DefaultSelector()
    with contextlib.ExitStack() as stack:
        stack.callback(selector.close)
        for _ in range(connections):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.sendall(request)
            selector.register(sock, selectors.EVENT_READ, bytearray())
        answered, begin_s = 0, now_s()
        while now_s() - begin_s < duration_s:
            for key, _ in selector.select(1):
                assert isinstance(key.fileobj, socket.socket)
                if not (piece := key.fileobj.recv(65536)):
                    raise RuntimeError(f"port {port} hung up")
                key.data.extend(piece)
                if _complete(key.data):
                    answered += 1
                    key.data.clear()
                    key.fileobj.sendall(request)
        return answered / (now_s() - begin_s)


def fresh_request_s(port: int, request: bytes) -> float:
    """Return how long a request takes that comes over a connection of its own."""
    begin_s = now_s()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(request)
        received = bytearray()
        while not _complete(received):
            if not (piece := sock.recv(65536)):
                raise RuntimeError(f"port {port} hung up")
            received.extend(piece)
    return now_s() - begin_s


def tags_request(port: int) -> bytes:
    return _get(port, "/api/tags")


def post_request(port: int, path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@contextlib.contextmanager
def idle_connections(port: int, count: int) -> Iterator[None]:
    """Hold connections that have asked once and now stay."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.sendall(_get(port, "/api/version"))
            received = bytearray()
            while not _complete(received):
                received.extend(sock.recv(65536))
        yield


@contextlib.contextmanager
def slow_readers(port: int, request: bytes, count: int) -> Iterator[None]:
    """Hold connections that have asked for a long answer, and read a few bytes of it now and then."""
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        sockets = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", port))
            sock.sendall(request)
            sock.setblocking(False)
            sockets.append(sock)

        def read() -> None:
            while not stop.wait(0.2):
                for sock in sockets:
                    with contextlib.suppress(BlockingIOError):
                        if not sock.recv(64):
                            raise RuntimeError("a slow reader had all of its answer, or was cut")

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield
        finally:
            stop.set()
            reader.join()


def wait_until_idle(server: OurServer, timeout_s: float = 120.0) -> None:
    """Wait until the runner has nothing to do: what it made for slow readers waits in the daemon then."""
    deadline = time.monotonic() + timeout_s
    while any(runner.slots_busy or runner.queued for runner in server.runners()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the runner is still busy after {timeout_s:g} s")
        time.sleep(0.1)


def _get(port: int, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()


def _complete(received: bytearray) -> bool:
    """Tell whether a whole answer is there; refuse one that is not 200."""
    head_size = received.find(b"\r\n\r\n")
    if head_size < 0:
        return False
    head = bytes(received[:head_size]).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(f"answered with {bytes(received[:500])!r}")
    _, found, length = head.partition(b"content-length:")
    if found:
        return len(received) >= head_size + 4 + int(length.split(b"\r\n")[0])
    return received.endswith(b"0\r\n\r\n")
