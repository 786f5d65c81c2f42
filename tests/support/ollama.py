"""Talks to the gateway as Ollama's clients do, and as none of them would."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.support.product import Product


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    content_type: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        """The objects of a stream."""
        assert self.body.endswith(b"\n")
        return [json.loads(line) for line in self.body[:-1].split(b"\n")]


@dataclass(frozen=True)
class Gateway:
    """Where the gateway answers."""

    url: str

    def post(self, path: str, body: object = None, *, raw: bytes | None = None) -> Reply:
        """Send JSON, or *raw* bytes, and read the whole answer."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            data = json.dumps(body).encode() if raw is None else raw
            connection.request("POST", path, data, {"content-type": "application/json"})
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, headers.get("content-type", ""), headers, response.read())
        finally:
            connection.close()


def gateway(product: Product) -> Gateway:
    """Return the gateway of a product whose daemon runs."""
    url = product.json("status")["http"]
    if not url:
        url = (product.home / "run" / "http.url").read_text()
    return Gateway(url)
