"""llama-server as a peer: the same engine, started as its users start it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.answers import Answer, now_s

_START_TIMEOUT_S = 120.0
_REQUEST_TIMEOUT_S = 600.0


class LlamaServer:
    """A llama-server on a loopback port; a context manager that ends it.

    Everything is left at its defaults but the model, the address, and what must be equal on both sides: the context
    and the number of answers at the same time, and threads when they are given.
    """

    name = "theirs"

    def __init__(
        self, program: Path, model: Path, *, slots: int, num_ctx: int, threads: int = 0, options: tuple[str, ...] = ()
    ) -> None:
        self.port = free_port()
        self._log = tempfile.TemporaryFile()
        command = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["-np", str(slots), "-c", str(slots * num_ctx), *options]
        if threads:
            command += ["-t", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()

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

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def ask(
        self,
        prompt: str,
        tokens: int,
        *,
        stop: threading.Event | None = None,
        on_text: Callable[[], None] | None = None,
    ) -> Answer:
        body = json.dumps({"prompt": prompt, "n_predict": tokens, "temperature": 0, "stream": True})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_REQUEST_TIMEOUT_S)
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

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._healthy():
            if self.process.poll() is not None:
                raise RuntimeError(f"llama-server ended with {self.process.returncode}\n{self.log()[-2000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"llama-server is not ready after {_START_TIMEOUT_S:g} s\n{self.log()[-2000:]}")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()


def _finish(answer: Answer, event: dict[str, object]) -> None:
    timings = event.get("timings")
    cached = timings.get("cache_n", 0) if isinstance(timings, dict) else 0
    answer.complete = True
    answer.prompt_tokens = int(str(event.get("tokens_evaluated", 0)))
    answer.generated_tokens = int(str(event.get("tokens_predicted", 0)))
    answer.cached_tokens = int(cached)


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
