"""llama-cpp-python's own server as a peer: the same bindings behind FastAPI and uvicorn, as its users install it.

It lives in an environment of its own, made on first use below the benchmarks' cache; the product never sees its
dependencies. The bindings themselves are those of the product, since building them takes minutes.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from bench.models import cache_directory
from bench.peer_server import PeerServer, free_port

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


class LlamaCppServer(PeerServer):
    """A running `llama_cpp.server` with one model; a context manager that ends it."""

    def __init__(self, model: Path) -> None:
        port = free_port()
        command = [str(environment()), "-m", "llama_cpp.server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        super().__init__(command, port=port, path="/v1/models", timeout_s=_START_TIMEOUT_S)
