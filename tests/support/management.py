"""An installed daemon whose gateway listens on a port of its own, for tests of Ollama's management routes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lmd.registry.digest import Digest
from tests.support.hub import HubServer
from tests.support.product import Product, installed


@dataclass
class Managed:
    """A running daemon, and how to reach its gateway."""

    product: Product
    hub: HubServer
    url: str = ""

    def start(self) -> None:
        """Start the daemon, for the first time or again: its gateway has another port then."""
        self.product.start()
        self.url = self.product.http_url

    def http(self, **options: Any) -> httpx.Client:
        """Return a client that takes its time; close it, or use it in a with block."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def request(self, method: str, path: str, body: object = None, **options: Any) -> httpx.Response:
        """Send one request, with *body* as JSON."""
        with self.http() as client:
            if body is not None:
                options["json"] = body
            return client.request(method, path, **options)

    def steps(self, path: str, body: Mapping[str, object]) -> list[dict[str, Any]]:
        """Return the lines of a stream."""
        answer = self.request("POST", path, body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert answer.text.endswith("\n")
        return [json.loads(line) for line in answer.text.splitlines()]

    def upload(self, file: Path) -> str:
        """Send a file; return its digest."""
        data = file.read_bytes()
        digest = str(Digest.of(data))
        answer = self.request("POST", f"/api/blobs/{digest}", content=data)
        assert answer.status_code in (200, 201), answer.text
        return digest

    def add(self, name: str, file: Path, **fields: object) -> None:
        """Make a model of a file."""
        body = {"model": name, "files": {file.name: self.upload(file)}, "stream": False, **fields}
        answer = self.request("POST", "/api/create", body)
        assert answer.json() == {"status": "success"}, answer.text

    def names(self) -> list[str]:
        """Return the names of the models, in the order of the list."""
        return [model["name"] for model in self.request("GET", "/api/tags").json()["models"]]


@contextlib.contextmanager
def managed(home: Path, hub: HubServer, **env: str) -> Iterator[Managed]:
    """Yield a running daemon on *home* whose Hub is *hub*."""
    with installed(home, HF_ENDPOINT=hub.endpoint, **env) as product:
        made = Managed(product, hub)
        made.start()
        yield made
