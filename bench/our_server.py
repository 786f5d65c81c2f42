"""The product as the server that is measured: an installed daemon, asked over its public socket."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.duration_pb2 import Duration

from bench.answers import Answer, now_s
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2, runtime_service_pb2
from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub
from lmd.v1.runtime_service_pb2_grpc import RuntimeServiceStub
from tests.support.product import Product, installed

#: The name of the model.
MODEL = "bench"
_FOR_EVER = Duration(seconds=-1)


class OurServer:
    """A daemon on a private home with the model loaded; a context manager that ends it.

    *settings* are variables of the daemon's environment, as `LMD_RUNTIME_…`.
    """

    name = "ours"

    def __init__(
        self,
        model: Path,
        *,
        slots: int,
        num_ctx: int,
        threads: int = 0,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.num_ctx = num_ctx
        self._parameters = model_pb2.Parameters(temperature=0, num_ctx=num_ctx)
        if threads:
            self._parameters.num_thread = threads
        self._stack = contextlib.ExitStack()
        try:
            scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lm-bench-")))
            home = scratch / "home"
            home.mkdir()
            env = {"LMD_RUNTIME_SLOTS": str(slots), "LMD_RUNTIME_NUM_CTX": str(num_ctx), **(settings or {})}
            self.product: Product = self._stack.enter_context(installed(home, **env))
            self._channel: grpc.Channel | None = None
            self.start()
            modelfile = home / "Modelfile"
            modelfile.write_text(f"FROM {model}\n")
            self.product.lm("create", MODEL, "-f", str(modelfile), timeout_s=600)
            self.load()
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
        self._hang_up()
        self._stack.close()

    def start(self) -> None:
        """Start the daemon."""
        self._daemon = self.product.start()
        # One connection, as one application has; all calls travel on it.
        self._channel = grpc.insecure_channel(f"unix:{self.product.socket}")
        self._inference = InferenceServiceStub(self._channel)
        self._runtime = RuntimeServiceStub(self._channel)

    def stop(self) -> None:
        """Stop the daemon as the system does."""
        self._hang_up()
        self._daemon.stop(timeout_s=120)

    def load(self) -> None:
        """Make the model resident with the settings that requests use, by a request that needs it."""
        self.ask("the", 1)

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    @property
    def pids(self) -> list[int]:
        return [self._daemon.pid]

    @property
    def model_pids(self) -> list[int]:
        return [runner.pid for runner in self.runners() if runner.pid]

    def runners(self) -> list[runtime_service_pb2.Runner]:
        return list(self._runtime.ListRunners(runtime_service_pb2.ListRunnersRequest()).runners)

    def ask(
        self,
        prompt: str,
        tokens: int,
        *,
        stop: threading.Event | None = None,
        on_text: Callable[[], None] | None = None,
    ) -> Answer:
        request = pb.GenerateRequest(
            model=MODEL, prompt=prompt, raw=True, parameters=self._parameters, keep_alive=_FOR_EVER
        )
        request.parameters.num_predict = tokens
        return generate(self._inference, request, stop=stop, on_text=on_text)


def generate(
    stub: InferenceServiceStub,
    request: pb.GenerateRequest,
    *,
    stop: threading.Event | None = None,
    on_text: Callable[[], None] | None = None,
) -> Answer:
    """Carry out *request*; hang up when *stop* is set."""
    answer = Answer(now_s())
    call = stub.Generate(request)
    for event in call:
        if event.HasField("delta"):
            answer.arrivals_s.append(now_s())
            if on_text is not None:
                on_text()
        elif event.HasField("done"):
            answer.complete = True
            answer.prompt_tokens = event.done.prompt_tokens
            answer.generated_tokens = event.done.generated_tokens
            answer.cached_tokens = event.done.cached_tokens
        if stop is not None and stop.is_set() and not answer.complete:
            call.cancel()
            break
    answer.end_s = now_s()
    return answer
