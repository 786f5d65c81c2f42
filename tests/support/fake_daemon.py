"""A daemon that tells stories: every service of `lmd.v1` over a real socket, answering from a script.

In a test, start `FakeDaemon(socket)` as a context manager and change its attributes. As a program,
`python -m tests.support.fake_daemon --socket PATH` serves a few demo models until it is told to shut down.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lmd.v1 import inference_service_pb2 as inference_pb
from lmd.v1 import (
    inference_service_pb2_grpc,
    model_pb2,
    model_service_pb2_grpc,
    runtime_service_pb2_grpc,
    store_service_pb2_grpc,
    system_service_pb2_grpc,
)
from lmd.v1 import model_service_pb2 as model_pb
from lmd.v1 import runtime_service_pb2 as runtime_pb
from lmd.v1 import store_service_pb2 as store_pb
from lmd.v1 import system_service_pb2 as system_pb
from lmd.v1.version import API_VERSION, __version__

MIB = 1024 * 1024
_DETAILS_KEY = "grpc-status-details-bin"


class FakeFailure(Exception):
    """Raise it in a script to end the call with a rich status, as the daemon would."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        violations: tuple[tuple[str, str], ...] = (),
        retry_after_s: int | None = None,
        **metadata: str,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status_pb2.Status(code=code.value[0], message=message)
        self._add(error_details_pb2.ErrorInfo(reason=reason, domain="lmd", metadata=metadata))
        if violations:
            bad_request = error_details_pb2.BadRequest()
            for where, description in violations:
                bad_request.field_violations.add(field=where, description=description)
            self._add(bad_request)
        if retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.seconds = retry_after_s
            self._add(retry)

    def _add(self, detail: Message) -> None:
        self.status.details.add().Pack(detail)


def not_found(name: str) -> FakeFailure:
    """Return what the daemon says to an unknown name."""
    return FakeFailure(
        grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", f"model `{name}` not found", name=name, hint="see `lm ls`"
    )


def model_info(
    name: str,
    *,
    size_bytes: int = 1_185_472,
    capabilities: tuple[str, ...] = ("completion", "chat"),
    age_s: int = 120,
    **details: Any,
) -> model_pb2.ModelInfo:
    """Return a plausible model."""
    digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    info = model_pb2.ModelInfo(
        model=model_pb2.Model(name=name, digest=digest, size_bytes=size_bytes, capabilities=capabilities),
        modelfile=f"FROM {name}\n",
    )
    info.model.modified_time.FromSeconds(int(time.time()) - age_s)
    facts: dict[str, Any] = {"architecture": "llama", "parameter_count": 260_000, "quantization": "F32"}
    for key, value in {**facts, "context_length": 512, **details}.items():
        setattr(info.model.details, key, value)
    info.files.add(role="weights", filename="model.gguf", digest=digest, size_bytes=size_bytes)
    info.origin.ref = name
    return info


def text_events(
    event: type[Message],
    text: str,
    *,
    size: int = 4,
    options: inference_pb.AnswerOptions | None = None,
    **done_fields: Any,
) -> Iterator[Any]:
    """Yield *text* in pieces and the end, as events of type *event*.

    Of *options* it obeys the choices, each of which begins with its number unless it is the first, and the log
    probabilities. *done_fields* are more fields of the end.
    """
    choices = max(1, options.choices) if options is not None else 1
    said = inference_pb.TokenLogprob(id=5, token=b"\xc3", logprob=-0.25)
    said.top.add(id=6, token=b"b", logprob=float("-inf"))
    logprobs = [said] if options is not None and options.HasField("top_logprobs") else []
    for choice in range(choices):
        own = text if choice == 0 else f"{choice} {text}"
        for number, start in enumerate(range(0, len(own), size), 1):
            piece = inference_pb.TextDelta(
                text=own[start : start + size], generated_tokens=number, choice=choice, logprobs=logprobs
            )
            yield event(delta=piece)
    done = inference_pb.AnswerDone(
        finish_reason=inference_pb.AnswerDone.FINISH_REASON_STOP,
        prompt_tokens=12,
        cached_tokens=4,
        generated_tokens=max(1, -(-len(text) // size)),
        seed=7,
        **done_fields,
    )
    if choices > 1:
        ended = inference_pb.ChoiceDone(finish_reason=done.finish_reason, generated_tokens=done.generated_tokens)
        done.choices.extend([ended] * choices)
        done.generated_tokens *= choices
    done.total_duration.FromMilliseconds(500)
    done.prompt_duration.FromMilliseconds(100)
    done.generate_duration.FromMilliseconds(400)
    yield event(done=done)


@dataclass
class Gate:
    """Holds a script back until the client hangs up or the test opens it. *reached* tells that the script is there."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    hung_up: threading.Event = field(default_factory=threading.Event)

    def wait(self, context: grpc.ServicerContext) -> None:
        """Block the script."""

        def on_end() -> None:
            self.hung_up.set()
            self.opened.set()

        if not context.add_callback(on_end):
            on_end()
        self.reached.set()
        assert self.opened.wait(30), "nobody opened the gate"


ChatScript = Callable[[inference_pb.ChatRequest, grpc.ServicerContext], Iterator[Any]]
GenerateScript = Callable[[inference_pb.GenerateRequest, grpc.ServicerContext], Iterator[Any]]
LeaseScript = Callable[[runtime_pb.LeaseMemoryRequest, grpc.ServicerContext], Iterator[runtime_pb.LeaseMemoryResponse]]
PullScript = Callable[[model_pb.PullModelRequest, grpc.ServicerContext], Iterator[model_pb.PullModelResponse]]


class FakeDaemon:
    """The state of the fake, open for tests to read and change."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.models: dict[str, model_pb2.ModelInfo] = {}
        self.runners: list[runtime_pb.Runner] = []
        self.devices: list[runtime_pb.ComputeDevice] = []
        self.watched: list[runtime_pb.WatchRunnersResponse] = []
        self.pulls: list[model_pb.Pull] = []
        self.garbage: list[store_pb.GarbageItem] = []
        self.usage = store_pb.GetDiskUsageResponse(models=1, blobs=3, blob_bytes=4 * MIB, free_bytes=900 * MIB)
        self.status = system_pb.GetStatusResponse(
            version=__version__,
            api_version=API_VERSION,
            pid=os.getpid(),
            uid=os.getuid(),
            socket=str(socket),
            http="http://127.0.0.1:11434",
            store="/home/u/.local/share/lmd",
            engine_version="0.3.36",
            rss_bytes=64 * MIB,
        )
        self.status.start_time.FromSeconds(int(time.time()) - 3600)
        self.status.devices.add(id="cpu", description="8 cores", total_bytes=32 * 1024 * MIB, free_bytes=8 * 1024 * MIB)
        #: Each call that came, by method and request, in order.
        self.calls: list[tuple[str, Message]] = []
        #: Failures to answer the next call of a method with.
        self.failures: dict[str, FakeFailure] = {}
        self.froms: list[str] = []
        self.uploads: list[bytes] = []
        #: The versions of models by their names, newest first.
        self.versions: dict[str, list[model_pb.Version]] = {}
        self.running_answers = 0
        #: Clear it, and an unload takes until it is set.
        self.unload_gate = threading.Event()
        self.unload_gate.set()
        self.plan = runtime_pb.GetPlanResponse()
        #: What fits, by the name that is asked for.
        self.fits: dict[str, runtime_pb.FitModelResponse] = {}
        self.lease: LeaseScript = self._lease
        #: What a lease that was granted waits at.
        self.leased = Gate()
        self.freed_bytes, self.pending_bytes = MIB, 0
        self.chat: ChatScript = self._echo
        self.generate: GenerateScript = self._continue
        self.pull: PullScript = self._pull
        self.shut_down = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=16), options=[("grpc.so_reuseport", 0)])

    def start(self) -> None:
        """Listen on the socket."""
        self.socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), self._server)
        runtime_service_pb2_grpc.add_RuntimeServiceServicer_to_server(_Runtime(self), self._server)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(self), self._server)
        store_service_pb2_grpc.add_StoreServiceServicer_to_server(_Store(self), self._server)
        system_service_pb2_grpc.add_SystemServiceServicer_to_server(_System(self), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(_Health(), self._server)
        self._server.add_insecure_port(f"unix:{self.socket}")
        self._server.start()

    def stop(self, grace_s: float | None = None) -> None:
        """Stop listening; running calls are cut, after *grace_s* if it is given."""
        self._server.stop(grace_s).wait()

    def __enter__(self) -> FakeDaemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, name: str, **facts: Any) -> model_pb2.ModelInfo:
        """Put a model into the store."""
        info = self.models[name] = model_info(name, **facts)
        return info

    def find(self, name: str) -> model_pb2.ModelInfo:
        """Return a model by its name, with or without ":latest"."""
        info = self.models.get(name) or self.models.get(f"{name}:latest")
        if info is None:
            raise not_found(name)
        return info

    def requests(self, method: str) -> list[Any]:
        """Return the requests of the calls of *method*."""
        return [request for name, request in self.calls if name == method]

    def take(self, method: str, request: Message) -> None:
        """Record a call, and fail it if a test wants so."""
        self.calls.append((method, request))
        failure = self.failures.pop(method, None)
        if failure is not None:
            raise failure

    def _echo(self, request: inference_pb.ChatRequest, _context: grpc.ServicerContext) -> Iterator[Any]:
        said = f"You said: {request.messages[-1].content}"
        return text_events(inference_pb.ChatResponse, said, options=request.options)

    def _continue(self, _request: inference_pb.GenerateRequest, _context: grpc.ServicerContext) -> Iterator[Any]:
        return text_events(inference_pb.GenerateResponse, " and they lived happily")

    def _lease(
        self, request: runtime_pb.LeaseMemoryRequest, context: grpc.ServicerContext
    ) -> Iterator[runtime_pb.LeaseMemoryResponse]:
        share = runtime_pb.DeviceShare(device=request.device or "cpu", bytes=request.bytes)
        yield runtime_pb.LeaseMemoryResponse(granted=share)
        self.leased = Gate()
        self.leased.wait(context)

    def _pull(
        self, request: model_pb.PullModelRequest, _context: grpc.ServicerContext
    ) -> Iterator[model_pb.PullModelResponse]:
        name = request.ref if ":" in request.ref else f"{request.ref}:latest"
        yield model_pb.PullModelResponse(started=model_pb.PullStarted(pull_id="p1", name=name))
        state = model_pb.PullProgress.State
        digest = "sha256:" + "a" * 64
        for done, now in ((0, state.STATE_DOWNLOADING), (MIB, state.STATE_COMMITTING), (MIB, state.STATE_DONE)):
            yield model_pb.PullModelResponse(
                progress=model_pb.PullProgress(
                    digest=digest, filename="model.gguf", completed_bytes=done, total_bytes=MIB, state=now
                )
            )
        yield model_pb.PullModelResponse(model=self.add(name).model)


def _abort(context: grpc.ServicerContext, failure: FakeFailure) -> None:
    context.set_trailing_metadata(((_DETAILS_KEY, failure.status.SerializeToString()),))
    context.abort(failure.code, failure.message)


def _unary(method: Callable[..., Any]) -> Callable[..., Any]:
    def handler(self: Any, request: Message, context: grpc.ServicerContext) -> Any:
        try:
            self.daemon.take(method.__name__, request)
            return method(self, request, context)
        except FakeFailure as failure:
            return _abort(context, failure)

    return handler


def _streamed(method: Callable[..., Any]) -> Callable[..., Any]:
    def handler(self: Any, request: Message, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            self.daemon.take(method.__name__, request)
            yield from method(self, request, context)
        except FakeFailure as failure:
            _abort(context, failure)

    return handler


class _Models(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    @_unary
    def ListModels(self, request: Any, context: Any) -> Any:
        models = [i.model for i in self.daemon.models.values() if i.model.name.startswith(request.prefix.lower())]
        return model_pb.ListModelsResponse(models=models)

    @_unary
    def GetModel(self, request: Any, context: Any) -> Any:
        return model_pb.GetModelResponse(info=self.daemon.find(request.name))

    @_unary
    def ListVersions(self, request: Any, context: Any) -> Any:
        name = self.daemon.find(request.name).model.name
        return model_pb.ListVersionsResponse(name=name, versions=self.daemon.versions.get(name, ()))

    @_unary
    def RollbackModel(self, request: Any, context: Any) -> Any:
        return model_pb.RollbackModelResponse(model=self.daemon.find(request.name).model, version=request.version or 1)

    @_unary
    def DeleteModel(self, request: Any, context: Any) -> Any:
        try:
            self.daemon.models.pop(self.daemon.find(request.name).model.name)
        except FakeFailure:
            if request.allow_missing:
                return model_pb.DeleteModelResponse()
            raise
        return model_pb.DeleteModelResponse(
            freed_bytes=self.daemon.freed_bytes, pending_bytes=self.daemon.pending_bytes
        )

    @_unary
    def CopyModel(self, request: Any, context: Any) -> Any:
        self.daemon.find(request.source)
        name = request.destination if ":" in request.destination else f"{request.destination}:latest"
        return model_pb.CopyModelResponse(model=self.daemon.add(name).model)

    @_unary
    def CheckModelfile(self, request: Any, context: Any) -> Any:
        lines = [line.partition(" ") for line in request.modelfile.splitlines()]
        froms, drafts = (
            [value.strip() for word, _, value in lines if word.upper() == directive] for directive in ("FROM", "DRAFT")
        )
        return model_pb.CheckModelfileResponse(**{"from": froms}, draft=drafts)

    @_streamed
    def CreateModel(self, request: Any, context: Any) -> Any:
        yield model_pb.CreateModelResponse(status="reading the header")
        name = request.name if ":" in request.name else f"{request.name}:latest"
        info = self.daemon.add(name)
        info.modelfile = request.modelfile
        yield model_pb.CreateModelResponse(model=info.model)

    @_streamed
    def QuantizeModel(self, request: Any, context: Any) -> Any:
        source = self.daemon.find(request.name).model
        yield model_pb.QuantizeModelResponse(status=f"quantizing F16 to {request.quantize}")
        yield model_pb.QuantizeModelResponse(
            progress=model_pb.PullProgress(
                filename="x.gguf",
                completed_bytes=MIB,
                total_bytes=MIB,
                state=model_pb.PullProgress.STATE_DONE,
            )
        )
        made = self.daemon.add(request.new_name or f"{source.name.partition(':')[0]}:{request.quantize.lower()}")
        for number, model in enumerate((source, made.model) if request.compare else ()):
            yield model_pb.QuantizeModelResponse(
                measurement=model_pb.Measurement(
                    name=model.name,
                    quantization=request.quantize if number else "F16",
                    size_bytes=(4 - 3 * number) * MIB,
                    perplexity=10 + number / 10,
                    scored_tokens=100,
                    prompt_tokens_per_second=200 + 100 * number,
                    answer_tokens_per_second=20 + 30 * number,
                )
            )
        yield model_pb.QuantizeModelResponse(model=made.model)

    @_streamed
    def PullModel(self, request: Any, context: Any) -> Any:
        yield from self.daemon.pull(request, context)

    @_unary
    def ListPulls(self, request: Any, context: Any) -> Any:
        return model_pb.ListPullsResponse(pulls=self.daemon.pulls)

    @_unary
    def CancelPull(self, request: Any, context: Any) -> Any:
        return model_pb.CancelPullResponse()

    @_streamed
    def ImportFile(self, request: Any, context: Any) -> Any:
        data = Path(request.path).read_bytes()
        step = model_pb.PullProgress(
            filename=Path(request.path).name,
            completed_bytes=len(data),
            total_bytes=len(data),
            state=model_pb.PullProgress.STATE_DONE,
        )
        yield model_pb.ImportFileResponse(progress=step)
        yield model_pb.ImportFileResponse(blob=_blob(data))

    @_unary
    def UploadBlob(self, request_iterator: Any, context: Any) -> Any:
        size_bytes = next(request_iterator).size_bytes
        data = b"".join(request.data for request in request_iterator)
        if len(data) != size_bytes:
            context.abort(grpc.StatusCode.CANCELLED, "the upload ended early")
        self.daemon.uploads.append(data)
        return model_pb.UploadBlobResponse(blob=_blob(data))


def _blob(data: bytes) -> model_pb.Blob:
    return model_pb.Blob(digest="sha256:" + hashlib.sha256(data).hexdigest(), size_bytes=len(data))


class _Runtime(runtime_service_pb2_grpc.RuntimeServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    @_unary
    def ListRunners(self, request: Any, context: Any) -> Any:
        return runtime_pb.ListRunnersResponse(runners=self.daemon.runners)

    @_unary
    def GetPlan(self, request: Any, context: Any) -> Any:
        return self.daemon.plan

    @_unary
    def ListDevices(self, request: Any, context: Any) -> Any:
        return runtime_pb.ListDevicesResponse(devices=self.daemon.devices)

    @_streamed
    def LoadModel(self, request: Any, context: Any) -> Any:
        info = self.daemon.find(request.name)
        yield runtime_pb.LoadModelResponse(progress=runtime_pb.LoadProgress(fraction=0.5))
        runner = runtime_pb.Runner(name=info.model.name, state=runtime_pb.Runner.STATE_READY)
        yield runtime_pb.LoadModelResponse(runner=runner)

    @_streamed
    def PinModel(self, request: Any, context: Any) -> Any:
        info = self.daemon.find(request.name)
        yield runtime_pb.PinModelResponse(progress=runtime_pb.LoadProgress(fraction=0.5))
        runner = runtime_pb.Runner(name=info.model.name, state=runtime_pb.Runner.STATE_READY, pinned=True)
        yield runtime_pb.PinModelResponse(runner=runner)

    @_unary
    def UnpinModel(self, request: Any, context: Any) -> Any:
        return runtime_pb.UnpinModelResponse(name=self.daemon.find(request.name).model.name)

    @_streamed
    def WatchRunners(self, request: Any, context: Any) -> Any:
        yield from self.daemon.watched

    @_unary
    def UnloadModel(self, request: Any, context: Any) -> Any:
        names = [
            runner.name for runner in self.daemon.runners if runner.name in (request.name, f"{request.name}:latest")
        ]
        if not names:
            raise not_found(request.name)
        self.daemon.unload_gate.wait()
        return runtime_pb.UnloadModelResponse(name=names[0], running_answers=self.daemon.running_answers)

    @_unary
    def FitModel(self, request: Any, context: Any) -> Any:
        if request.name not in self.daemon.fits:
            raise not_found(request.name)
        return self.daemon.fits[request.name]

    @_streamed
    def LeaseMemory(self, request: Any, context: Any) -> Any:
        yield from self.daemon.lease(request, context)


class _Inference(inference_service_pb2_grpc.InferenceServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    @_streamed
    def Generate(self, request: Any, context: Any) -> Any:
        yield from self.daemon.generate(request, context)

    @_streamed
    def Chat(self, request: Any, context: Any) -> Any:
        yield from self.daemon.chat(request, context)

    @_unary
    def Embed(self, request: Any, context: Any) -> Any:
        """Give each text a vector of its numbers of characters and words."""
        self.daemon.find(request.model)
        reply = inference_pb.EmbedResponse()
        for text in request.inputs:
            words = len(text.split())
            numbers = [len(text), words, 0.125, -1][: request.dimensions or None]
            reply.embeddings.add(values=numbers, prompt_tokens=words)
            reply.prompt_tokens += words
        reply.total_duration.FromMilliseconds(50)
        return reply

    @_unary
    def Rerank(self, request: Any, context: Any) -> Any:
        """Score documents by their length."""
        self.daemon.find(request.model)
        order = sorted(enumerate(request.documents), key=lambda pair: -len(pair[1]))
        reply = inference_pb.RerankResponse(prompt_tokens=len(order))
        for index, document in order[: request.top_n or None]:
            reply.results.add(index=index, score=len(document) / 8)
        return reply

    @_unary
    def Tokenize(self, request: Any, context: Any) -> Any:
        """Make a token of each byte, whose id is the byte; the special token is 1."""
        self.daemon.find(request.model)
        reply = inference_pb.TokenizeResponse()
        if request.add_special:
            reply.tokens.add(id=1, piece=b"<s>")
        for byte in request.text.encode():
            reply.tokens.add(id=byte, piece=bytes([byte]))
        return reply

    @_unary
    def Detokenize(self, request: Any, context: Any) -> Any:
        self.daemon.find(request.model)
        return inference_pb.DetokenizeResponse(text=bytes(request.tokens).decode(errors="replace"))

    @_unary
    def ApplyTemplate(self, request: Any, context: Any) -> Any:
        self.daemon.find(request.model)
        reply = inference_pb.ApplyTemplateResponse()
        for message in request.messages:
            piece = f"<{message.role}>{message.content}\n"
            reply.prompt += piece
            reply.tokens.add(id=len(piece), piece=piece.encode())
        return reply


class _Store(store_service_pb2_grpc.StoreServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    @_unary
    def GetDiskUsage(self, request: Any, context: Any) -> Any:
        return self.daemon.usage

    @_streamed
    def CollectGarbage(self, request: Any, context: Any) -> Any:
        freed = 0
        for item in self.daemon.garbage:
            freed += item.size_bytes
            yield store_pb.CollectGarbageResponse(item=item)
        summary = store_pb.GarbageSummary(items=len(self.daemon.garbage), freed_bytes=freed, spared_items=1)
        yield store_pb.CollectGarbageResponse(summary=summary)


class _System(system_service_pb2_grpc.SystemServiceServicer):
    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon

    @_unary
    def GetStatus(self, request: Any, context: Any) -> Any:
        return self.daemon.status

    @_unary
    def Shutdown(self, request: Any, context: Any) -> Any:
        self.daemon.shut_down.set()
        return system_pb.ShutdownResponse()


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    def Check(self, request: Any, context: Any) -> Any:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def serve(socket: Path, prepare: Callable[[FakeDaemon], None] | None = None) -> None:
    """Serve until SIGTERM or the Shutdown call."""
    daemon = FakeDaemon(socket)
    if prepare is not None:
        prepare(daemon)
    signal.signal(signal.SIGTERM, lambda *_: daemon.shut_down.set())
    with daemon:
        daemon.shut_down.wait()
        # The call that asks for it has its answer first.
        daemon.stop(grace_s=5)
    socket.unlink(missing_ok=True)


def main() -> None:
    """Serve the demo models on the socket of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    from tests.support.fake_demo import prepare

    serve(parser.parse_args().socket, prepare)


if __name__ == "__main__":
    main()
