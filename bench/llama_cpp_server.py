"""llama-cpp-python's own server as a peer: the same bindings behind FastAPI and uvicorn, as its users install it.

It lives in an environment of its own, made on first use below the benchmarks' cache; the product never sees its
dependencies. The bindings themselves are those of the product, since building them takes minutes.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.llama_server import free_port
from bench.models import cache_directory

#: What the extra `server` of llama-cpp-python 0.3.36 asks for, and what its bindings need.
_REQUIREMENTS = (
    *("uvicorn>=0.22", "fastapi>=0.100", "pydantic-settings>=2.0.1", "sse-starlette>=1.6.1"),
    *(
        "starlette-context>=0.3.6,<0.4",
        "PyYAML>=5.1",
        "typing-extensions>=4.5",
        "numpy>=1.20",
        "diskcache>=5.6.1",
        "jinja2",
    ),
)
_START_TIMEOUT_S = 60.0


def environment() -> Path:
    """Return the Python of the environment, made if it is not there."""
    directory = cache_directory() / f"llama-cpp-server-py{sys.version_info.major}{sys.version_info.minor}"
    python = directory / "bin" / "python"
    marker = directory / "made"
    if marker.exists() and marker.read_text() == "\n".join(_REQUIREMENTS):
        return python
    print(f"making the peer's environment {directory}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *_REQUIREMENTS], check=True)
    found = importlib.util.find_spec("llama_cpp")
    assert found is not None
    assert found.origin is not None
    packages = next(directory.glob("lib/python*/site-packages"))
    (packages / "llama_cpp").symlink_to(Path(found.origin).parent)
    marker.write_text("\n".join(_REQUIREMENTS))
    return python


class LlamaCppServer:
    """A running `llama_cpp.server` with one model; a context manager that ends it."""

    def __init__(self, model: Path) -> None:
        self.port = free_port()
        self._log = tempfile.TemporaryFile()
        command = [str(environment()), "-m", "llama_cpp.server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
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

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                log = self._log.read().decode(errors="replace")
                raise RuntimeError(f"llama_cpp.server does not answer ({self.process.poll()})\n{log[-2000:]}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            try:
                connection.request("GET", "/v1/models")
                return connection.getresponse().status == http.client.OK
            except OSError:
                return False
