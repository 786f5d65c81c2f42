"""The list of models over HTTP, as a ratio: our `/api/tags` to `/v1/models` of `llama_cpp.server`, requests per second.

    with one model      at least 2
    with 21 models      at least 2; theirs still lists its one

Both sides are asked alternately over the same number of connections that stay open, each request after the answer to
the one before. The best round of each counts, so that other load on the machine changes both alike.

    python -m bench.tags --model FILE [--server-python PYTHON] [--rounds 5] [--seconds 2] [--connections 8]

`llama_cpp.server` needs packages that this project does not (`llama-cpp-python[server]`); PYTHON is one that has them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.hub import HubServer
from tests.support.management import Managed, managed
from tests.support.product import wait_until

LIMIT = 2.0
_MORE_NAMES = 20


async def _ask(url: str, until: float) -> int:
    """Return how many answers one connection got until then."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    answers = 0
    while time.monotonic() < until:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert head.split(b" ", 2)[1] == b"200", head
        await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        answers += 1
    writer.close()
    return answers


async def _rate(url: str, connections: int, seconds: float) -> float:
    """Return the answers per second of all connections together."""
    begun = time.monotonic()
    counts = await asyncio.gather(*(_ask(url, begun + seconds) for _ in range(connections)))
    return sum(counts) / (time.monotonic() - begun)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextlib.contextmanager
def _their_server(python: str, model: Path) -> Iterator[str]:
    """Yield the URL of the list of their server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = [python, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or _listens(port), "llama_cpp.server listens")
        if process.poll() is not None:
            sys.exit(f"{python} cannot run llama_cpp.server; see --server-python")
        yield f"http://127.0.0.1:{port}/v1/models"
    finally:
        process.terminate()
        process.wait()


def _compare(ours: str, theirs: str, options: argparse.Namespace) -> dict[str, object]:
    pairs = [
        [asyncio.run(_rate(url, options.connections, options.seconds)) for url in (ours, theirs)]
        for _ in range(options.rounds)
    ]
    best_ours, best_theirs = (max(side) for side in zip(*pairs, strict=True))
    ratio = best_ours / best_theirs
    return {"ours_per_s": round(best_ours), "theirs_per_s": round(best_theirs), "ratio": ratio, "met": ratio >= LIMIT}


def _add_names(daemon: Managed) -> None:
    for number in range(_MORE_NAMES):
        daemon.request("POST", "/api/copy", {"source": "one", "destination": f"name-{number}"}).raise_for_status()


def main() -> None:
    """Measure, and print the outcome as JSON; the status is 1 when a limit is not met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--server-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--connections", type=int, default=8)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as home,
        HubServer() as hub,
        managed(Path(home), hub) as daemon,
        _their_server(options.server_python, options.model) as theirs,
    ):
        daemon.add("one", options.model)
        ours = f"{daemon.url}/api/tags"
        outcome = {"one_model": _compare(ours, theirs, options)}
        _add_names(daemon)
        outcome["21_models"] = _compare(ours, theirs, options)
    print(json.dumps(outcome, indent=2))
    sys.exit(0 if all(side["met"] for side in outcome.values()) else 1)


if __name__ == "__main__":
    main()
