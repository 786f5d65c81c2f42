"""llama-server as a peer: the same engine, started as its users start it."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

from bench.answers import Answer, now_s
from bench.peer_server import PeerServer, free_port

_START_TIMEOUT_S = 120.0
_REQUEST_TIMEOUT_S = 600.0


class LlamaServer(PeerServer):
    """A llama-server on a loopback port; a context manager that ends it.

    Everything is left at its defaults but the model, the address, and what must be equal on both sides: the context
    and the number of answers at the same time, and threads when they are given.
    """

    name = "theirs"

    def __init__(
        self, program: Path, model: Path, *, slots: int, num_ctx: int, threads: int = 0, options: tuple[str, ...] = ()
    ) -> None:
        port = free_port()
        command = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["-np", str(slots), "-c", str(slots * num_ctx), *options]
        if threads:
            command += ["-t", str(threads)]
        super().__init__(command, port=port, path="/health", timeout_s=_START_TIMEOUT_S)

    @property
    def pids(self) -> list[int]:
        return [self.process.pid]

    @property
    def model_pids(self) -> list[int]:
        return [self.process.pid]

    @property
    def threads(self) -> int:
        """How many threads it says it computes with; 0 when it does not say."""
        found = re.search(r"n_threads = (\d+)", self.log())
        return int(found.group(1)) if found else 0

    def ask(
        self,
        prompt: str,
        tokens: int,
        *,
        stop: threading.Event | None = None,
        on_text: Callable[[], None] | None = None,
    ) -> Answer:
        return complete(self.port, prompt, tokens, stop=stop, on_text=on_text)


def complete(
    port: int,
    prompt: str,
    tokens: int,
    *,
    stop: threading.Event | None = None,
    on_text: Callable[[], None] | None = None,
    **more: object,
) -> Answer:
    """Have the llama-server on *port* continue *prompt*; *more* are other members of the request."""
    body = json.dumps({"prompt": prompt, "n_predict": tokens, "temperature": 0, "stream": True, **more})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_REQUEST_TIMEOUT_S)
    answer = Answer(now_s())
    try:
        connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise RuntimeError(f"llama-server answers {response.status}: {response.read(500)!r}")
        for line in response:
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[len(b"data: ") :])
            if event.get("content"):
                answer.arrivals_s.append(now_s())
                if on_text is not None:
                    on_text()
            if event.get("stop"):
                _finish(answer, event)
                break
            if stop is not None and stop.is_set():
                break
    finally:
        connection.close()
    answer.end_s = now_s()
    return answer


def _finish(answer: Answer, event: dict[str, object]) -> None:
    timings = event.get("timings")
    cached = timings.get("cache_n", 0) if isinstance(timings, dict) else 0
    answer.complete = True
    answer.prompt_tokens = int(str(event.get("tokens_evaluated", 0)))
    answer.generated_tokens = int(str(event.get("tokens_predicted", 0)))
    answer.cached_tokens = int(cached)
