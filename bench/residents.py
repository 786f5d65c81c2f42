"""Servers that have several models and memory for fewer: the daemon, and llama-server's router."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import grpc
import psutil
from google.protobuf.duration_pb2 import Duration

from bench.answers import Answer
from bench.llama_server import complete
from bench.meter import processes
from bench.our_server import generate
from bench.peer_server import PeerServer, free_port
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2, runtime_service_pb2
from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub
from lmd.v1.runtime_service_pb2_grpc import RuntimeServiceStub
from tests.support.product import Product, installed, wait_until

SLOTS = 4
_START_TIMEOUT_S = 60.0
_STEADY = Path(__file__).parent / "steady_machine"
DISTURBED = "another program took or gave back memory meanwhile"
#: Longer than any measurement, and not for ever: what stays for ever is never evicted.
_KEEP_ALIVE = Duration(seconds=86_400)


class ModelServer(Protocol):
    """A running server that is asked for models by name.

    Attributes:
        name: "ours" or "theirs".
    """

    name: str

    @property
    def pids(self) -> list[int]:
        """All its processes; their children belong to them."""

    def ask(self, model: str, prompt: str, tokens: int, *, on_text: Callable[[], None] | None = None) -> Answer:
        """Have *model* continue *prompt* greedily by *tokens* tokens. Callable from many threads."""

    def loads(self) -> int:
        """How many models it has loaded since it started."""

    def resident_models(self) -> set[str]:
        """Return the names of the models that are in memory, or on their way into it or out of it."""


class OurModels:
    """A daemon with *models* by name, and memory for *room* of them, which cost the same; a context manager.

    The memory that the daemon has is set by what it has to leave free: one model is loaded and measured, and what is
    then free beyond *room* and a half of them is reserved; without *room*, nothing is. With *steady*, the daemon is
    made to believe that the machine has that much, and that nothing else runs on it. Prefixes are not kept outside of
    the context (`kv_ram_bytes`), so that a model takes what was measured. Everything else is at its defaults.
    """

    name = "ours"

    def __init__(
        self,
        models: Mapping[str, Path],
        *,
        room: int | None = None,
        steady: bool = False,
        slots: int = SLOTS,
        num_ctx: int,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.num_ctx = num_ctx
        self._channel: grpc.Channel | None = None
        self._stack = contextlib.ExitStack()
        try:
            scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lm-bench-")))
            home = scratch / "home"
            home.mkdir()
            env = {
                "LMD_RUNTIME_SLOTS": str(slots),
                "LMD_RUNTIME_NUM_CTX": str(num_ctx),
                "LMD_RUNTIME_KV_RAM_BYTES": "0",
            }
            self.product: Product = self._stack.enter_context(installed(home, **env, **(settings or {})))
            self._start()
            for name, path in models.items():
                modelfile = home / "Modelfile"
                modelfile.write_text(f"FROM {path}\n")
                self.product.lm("create", name, "-f", str(modelfile), timeout_s=600)
            self._models, self._room, self._steady = list(models), room, steady
            self._facts: dict[str, object] = {}
            if room is not None:
                self.make_scarce()
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
        if self._channel is not None:
            self._channel.close()
        self._stack.close()

    @property
    def pids(self) -> list[int]:
        return [self._daemon.pid]

    def facts(self) -> dict[str, object]:
        """Return how the memory was made scarce, for who reads the figures."""
        return self._facts

    def ask(self, model: str, prompt: str, tokens: int, *, on_text: Callable[[], None] | None = None) -> Answer:
        parameters = model_pb2.Parameters(temperature=0, num_ctx=self.num_ctx, num_predict=tokens)
        request = pb.GenerateRequest(
            model=model, prompt=prompt, raw=True, parameters=parameters, keep_alive=_KEEP_ALIVE
        )
        return generate(self._inference, request, on_text=on_text)

    def loads(self) -> int:
        return self._daemon.log.read_text().count("model_loaded")

    def resident_models(self) -> set[str]:
        return {runner.name.removesuffix(":latest") for runner in self.residents()}

    def residents(self) -> list[runtime_service_pb2.Runner]:
        """Return the runners that hold memory for a model."""
        runners = self._runtime.ListRunners(runtime_service_pb2.ListRunnersRequest()).runners
        return [runner for runner in runners if runner.state != runtime_service_pb2.Runner.STATE_FAILED]

    def load(self, model: str) -> runtime_service_pb2.Runner:
        """Make *model* resident."""
        *_, last = self._runtime.LoadModel(runtime_service_pb2.LoadModelRequest(name=model, keep_alive=_KEEP_ALIVE))
        return last.runner

    def unload(self, model: str) -> None:
        """Unload *model*, and wait until its runner is gone."""
        self._runtime.UnloadModel(runtime_service_pb2.UnloadModelRequest(name=model))
        wait_until(lambda: not self.residents(), f"{model} is gone", timeout_s=60)

    def make_scarce(self) -> None:
        """Leave memory for as many models as there is to be room for, and see that they are resident in the end."""
        if self._room is None:
            raise ValueError("there is no room to keep to")
        # Without a reserve, whatever the last one was.
        self._stop()
        self._start()
        self.ask(self._models[0], "the", 1)
        (runner,) = self.residents()
        # The daemon remembers that too, and plans with it from now on.
        model_bytes = runner.memory_bytes
        self.unload(self._models[0])
        wanted_bytes = model_bytes * (2 * self._room + 1) // 2
        free_bytes = psutil.virtual_memory().available
        if free_bytes < wanted_bytes:
            raise RuntimeError(f"{free_bytes} bytes are free, too little for {self._room} times {model_bytes} bytes")
        self._stop()
        if self._steady:
            reserve_bytes, free_bytes = 0, wanted_bytes
            python_path = os.pathsep.join(filter(None, [str(_STEADY), os.environ.get("PYTHONPATH")]))
            env = {"PYTHONPATH": python_path, "LM_BENCH_MACHINE_BYTES": str(wanted_bytes)}
        else:
            reserve_bytes, env = free_bytes - wanted_bytes, {}
        self._start(LMD_RUNTIME_MEMORY_RESERVE_BYTES=str(reserve_bytes), **env)
        for model in self._models:
            self.ask(model, "the", 1)
        if (found := len(self.residents())) != self._room:
            raise RuntimeError(f"{found} models are resident where {self._room} fit: {DISTURBED}")
        self._facts = {
            "model_bytes": model_bytes,
            "free_bytes": free_bytes,
            "memory_reserve_bytes": reserve_bytes,
            "models_that_fit": self._room,
            "steady": self._steady,
        }

    def free_without_us_bytes(self) -> int:
        """Return what would be free without the models; what changes in that is others' doing."""
        ours = 0
        for process in processes(self.pids):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_info()
                # Mapped weights are page cache: they count as free anyway.
                ours += memory.rss - memory.shared
        return int(psutil.virtual_memory().available) + ours

    def _start(self, **env: str) -> None:
        self._daemon = self.product.start(**env)
        self._channel = grpc.insecure_channel(f"unix:{self.product.socket}")
        self._inference = InferenceServiceStub(self._channel)
        self._runtime = RuntimeServiceStub(self._channel)

    def _stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._daemon.stop(timeout_s=60)


class LlamaRouter(PeerServer):
    """llama-server without a model: it loads what is asked for, at most *room* at a time; a context manager.

    The context, the number of answers at the same time and the number of models are ours; the rest is its defaults.
    """

    name = "theirs"

    def __init__(
        self,
        program: Path,
        models: Mapping[str, Path],
        *,
        room: int,
        slots: int = SLOTS,
        num_ctx: int,
        options: tuple[str, ...] = (),
    ) -> None:
        # A model is called as its file is.
        self._folder = tempfile.TemporaryDirectory(prefix="lm-bench-")
        for name, path in models.items():
            (Path(self._folder.name) / f"{name}.gguf").symlink_to(path)
        port = free_port()
        command = [str(program), "--models-dir", self._folder.name, "--models-max", str(room)]
        command += ["--host", "127.0.0.1", "--port", str(port), "-np", str(slots), "-c", str(slots * num_ctx), *options]
        try:
            super().__init__(command, port=port, path="/health", timeout_s=_START_TIMEOUT_S)
        except BaseException:
            self._folder.cleanup()
            raise

    def close(self) -> None:
        # Its children end when it does in order; they are not left if it does not.
        children = processes([self.process.pid])[1:]
        super().close()
        _, left = psutil.wait_procs(children, timeout=10)
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._folder.cleanup()

    @property
    def pids(self) -> list[int]:
        return [self.process.pid]

    def ask(self, model: str, prompt: str, tokens: int, *, on_text: Callable[[], None] | None = None) -> Answer:
        return complete(self.port, prompt, tokens, on_text=on_text, model=model)

    def loads(self) -> int:
        return self.log().count("spawning server instance with name")

    def resident_models(self) -> set[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/models", timeout=_START_TIMEOUT_S) as response:
            models = json.load(response)["data"]
        return {model["id"] for model in models if model["status"]["value"] != "unloaded"}
