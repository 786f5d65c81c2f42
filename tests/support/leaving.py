"""Clients of the gateway that leave, wherever they happen to be, and what the daemon then still holds for them."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from lmd.registry.digest import Digest
from tests.support.metrics import Values
from tests.support.product import Product, wait_until

#: A model that answers for as long as nobody leaves, and one that ranks.
MODEL, RANKER = "slow", "ranker"
BLOB = b"the bytes of a blob" * 100

_CHAT = [{"role": "user", "content": "the people went"}]
_ENDLESS = {"num_predict": 3000, "temperature": 0}
_RANK = {"model": RANKER, "query": "water", "documents": ["the people"] * 64}
#: What is asked of each route that takes a body.
BODIES: dict[str, object] = {
    "POST /api/generate": {"model": MODEL, "prompt": "the people went", "options": _ENDLESS},
    "POST /api/chat": {"model": MODEL, "messages": _CHAT, "options": _ENDLESS},
    "POST /api/embed": {"model": MODEL, "input": ["the people went to water"] * 64},
    "POST /api/embeddings": {"model": MODEL, "prompt": "the people went to water"},
    "POST /api/show": {"model": MODEL, "verbose": True},
    "POST /api/pull": {"model": "hf.co/test/stalls"},
    "POST /api/push": {"model": MODEL},
    "POST /api/create": {"model": "other", "from": MODEL, "system": "be brief"},
    "POST /api/copy": {"source": MODEL, "destination": "another"},
    "DELETE /api/delete": {"model": "nosuch"},
    "POST /api/blobs/{digest}": BLOB,
    "POST /v1/chat/completions": {"model": MODEL, "messages": _CHAT, "max_tokens": 3000, "stream": True},
    "POST /v1/completions": {"model": MODEL, "prompt": "the people went", "max_tokens": 3000, "stream": True},
    "POST /v1/embeddings": {"model": MODEL, "input": ["the people went to water"] * 64},
    "POST /v1/responses": {"model": MODEL, "input": "the people went", "max_output_tokens": 3000, "stream": True},
    "POST /v1/messages": {"model": MODEL, "messages": _CHAT, "max_tokens": 3000, "stream": True},
    "POST /v1/messages/count_tokens": {"model": MODEL, "messages": _CHAT},
    **{f"POST {path}": _RANK for path in ("/v1/rerank", "/rerank", "/v1/reranking", "/reranking")},
    "POST /tokenize": {"model": MODEL, "content": "the people went to water"},
    "POST /detokenize": {"model": MODEL, "tokens": [300, 301]},
    "POST /apply-template": {"model": MODEL, "messages": _CHAT},
}
_PARAMETERS = {"{digest}": str(Digest.of(BLOB)), "{id}": MODEL}


@dataclass(frozen=True)
class Holdings:
    """What the daemon holds, beside what the one who asks takes."""

    requests: int
    tasks: int
    descriptors: int
    slots_busy: int
    queued: int
    pulls: int

    def within(self, other: Holdings) -> bool:
        return all(getattr(self, name) <= getattr(other, name) for name in self.__dataclass_fields__)


def metrics_of(url: str) -> Values:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request("GET", "/metrics")
        return Values(connection.getresponse().read().decode())
    finally:
        connection.close()


def holdings(url: str) -> Holdings:
    values = metrics_of(url)
    return Holdings(
        requests=int(values("lmd_requests_running", transport="http") or 0) - 1,
        tasks=int(values("lmd_tasks") or 0),
        descriptors=int(values("process_open_fds") or 0),
        slots_busy=int(sum(value for _, value in values.labelled("lmd_model_slots_busy"))),
        queued=int(sum(value for _, value in values.labelled("lmd_model_queue_length"))),
        pulls=int(values("lmd_pulls_running") or 0),
    )


def request_of(endpoint: str, url: str, **changes: object) -> tuple[bytes, bytes]:
    """Return the head and the body of a request to `VERB /path`, with some fields of the body changed."""
    verb, _, path = endpoint.partition(" ")
    for name, value in _PARAMETERS.items():
        path = path.replace(name, value)
    content = BODIES.get(endpoint, b"")
    body = content if isinstance(content, bytes) else json.dumps({**dict(content), **changes}).encode()  # type: ignore[call-overload]
    lines = [f"{verb} {path} HTTP/1.1", f"Host: {urlsplit(url).netloc}", f"Content-Length: {len(body)}"]
    lines.append("Content-Type: application/json")
    return ("\r\n".join(lines) + "\r\n\r\n").encode(), body


class Visitor:
    """A client that says as much as it likes and leaves without a word."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        assert address.port is not None
        self.socket = socket.create_connection(("127.0.0.1", address.port), timeout=60)

    def say(self, data: bytes) -> Visitor:
        self.socket.sendall(data)
        return self

    def hear_the_beginning(self) -> bytes:
        """Read until some of the body has come."""
        heard = b""
        while not heard.partition(b"\r\n\r\n")[2].strip():
            piece = self.socket.recv(65536)
            assert piece, f"hung up after {heard!r}"
            heard += piece
        assert heard.startswith(b"HTTP/1.1 200"), heard
        return heard

    def leave(self) -> None:
        self.socket.close()

    def slam(self) -> None:
        """Leave with a reset, as a process that was killed."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


#: How visitors leave.
WAYS: tuple[Callable[[Visitor], None], ...] = (Visitor.leave, Visitor.slam)


def places(head: bytes, body: bytes) -> Iterator[bytes]:
    """Yield what a client has said at each place where it may leave."""
    yield b""
    yield head[: len(head) // 2]
    yield head
    if body:
        yield head + body[: len(body) // 2]
        yield head + body[:-1]
    yield head + body


@contextmanager
def nothing_left(product: Product, url: str) -> Iterator[Holdings]:
    """Yield what the daemon holds before the block, and fail when it holds more for long after it."""
    before = holdings(url)
    yield before
    seen: list[Holdings] = []

    def gone() -> bool:
        seen[:] = [holdings(url)]
        return seen[0].within(before)

    try:
        wait_until(gone, "what was held before is all that is held", timeout_s=20)
    except AssertionError:
        log = product.daemons[-1].log.read_text()[-3000:]
        raise AssertionError(f"held before: {before}\nheld now: {seen[0]}\n{log}") from None
