"""Fixtures of the contract tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest

from lmd.daemon.embedding import Embedding
from lmd.daemon.inference import Inference
from lmd.daemon.model_calls import ModelCalls
from lmd.daemon.residency.pins import Pins
from lmd.daemon.rpc_errors import error_interceptor
from lmd.daemon.services.calls import InferenceCallsServicer
from lmd.daemon.services.runtime import RuntimeServiceServicer
from lmd.daemon.tokenizing import Tokenizing
from lmd.v1 import inference_service_pb2_grpc as rpc
from lmd.v1 import runtime_service_pb2_grpc
from tests.support.formats import Tokenizer
from tests.support.inference_bench import Bench, Catalog, Connection
from tests.support.leaks import nothing_left_in
from tests.support.residents import Threads, World
from tests.support.shared_models import shared_model
from tests.support.tiny_models import make_tiny_llama


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for loopback addresses and its key, made afresh."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    where = tmp_path_factory.mktemp("tls")
    certificate, key = where / "cert.pem", where / "key.pem"
    names = "subjectAltName=IP:127.0.0.1,IP:127.0.0.2,DNS:localhost"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command = [openssl, "req", "-x509", *curve, "-keyout", str(key), "-out", str(certificate), "-days", "2"]
    subprocess.run([*command, "-subj", "/CN=loopback", "-addext", names], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary of a few hundred words and bytes."""
    return Tokenizer(make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf"))


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    """A real vocabulary, of 128,000 tokens."""
    return Tokenizer(shared_model("vocab/ggml-vocab-llama-bpe.gguf"))


@pytest.fixture
def no_leaks(tmp_path: Path) -> Iterator[None]:
    # gRPC keeps its poller for the life of the process.
    with nothing_left_in(tmp_path / "run" / "runners", more_descriptors=16):
        yield


@pytest.fixture
async def bench(tmp_path: Path, no_leaks: None) -> AsyncIterator[Bench]:
    world, catalog = World(tmp_path), Catalog()
    yield Bench(world, catalog, Inference(catalog, world.residency, world.config))
    await world.close()


@pytest.fixture
async def connection(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Connection]:
    for module in ("inference", "runtime", "calls"):
        monkeypatch.setattr(f"lmd.daemon.services.{module}.cache_scope_of", lambda context: "uid:1")
    server = grpc.aio.server(interceptors=[error_interceptor()])
    calls = ModelCalls(bench.catalog, bench.world.residency, bench.world.config)
    service = InferenceCallsServicer(bench.inference, Embedding(calls), Tokenizing(calls))
    rpc.add_InferenceServiceServicer_to_server(service, server)
    world = bench.world
    pins = Pins(world.residency, bench.catalog.resolve, world.memory, Threads())
    # The calls about memory and devices need more of a daemon; they have tests of their own.
    runtime = RuntimeServiceServicer(bench.catalog, world.residency, pins)  # type: ignore[abstract]
    runtime_service_pb2_grpc.add_RuntimeServiceServicer_to_server(runtime, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        yield Connection(channel)
    await server.stop(None)
