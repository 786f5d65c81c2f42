from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog.testing
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import lmd.daemon.errors
import lmd.registry.errors
from lmd.daemon.admission import Admission
from lmd.daemon.errors import QueueFull, RunnerCrashed
from lmd.daemon.rpc_errors import CODES, MAX_DETAILS_BYTES, error_interceptor, to_status
from lmd.registry.errors import InvalidRequest, LmdError, ModelfileProblem, ModelfileSyntax, ModelNotFound
from lmd.v1 import error_reason_pb2

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
REASONS = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}


def error_classes(module: Any) -> list[type[LmdError]]:
    return [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, LmdError)]


ALL_ERRORS = sorted({*error_classes(lmd.registry.errors), *error_classes(lmd.daemon.errors)}, key=lambda c: c.__name__)


def test_every_reason_has_a_code() -> None:
    assert set(CODES) == REASONS


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda c: c.__name__)
def test_every_error_has_a_reason_of_the_wire(error: type[LmdError]) -> None:
    assert error.reason in REASONS


def test_every_reason_is_documented_with_its_code() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \| [^|]+ \| [^|]+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert dict(rows) == {reason: code.name for reason, code in CODES.items()}
    assert len(rows) == len(REASONS)


#: gRPC shares connections by address within a process, so one to a server that has ended could get the next call.
SOCKETS = itertools.count(1)


class Client:
    """Calls the one handler with raw bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def unary(self, method: str = "/test/Call") -> grpc.aio.UnaryUnaryCall[bytes, bytes]:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method)
        return call(b"")

    def stream(self) -> grpc.aio.UnaryStreamCall[bytes, bytes]:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream("/test/Call")
        return call(b"")


@asynccontextmanager
async def serving(
    directory: Path, handler: Callable[[Any, Any], Any], *, stream: bool = False, admission: Admission | None = None
) -> AsyncIterator[Client]:
    """Serve one handler as /test/Call behind the interceptors, and connect to it."""

    class Handlers(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            build = grpc.unary_stream_rpc_method_handler if stream else grpc.unary_unary_rpc_method_handler
            return build(handler)

    interceptors = [error_interceptor()] + ([admission.interceptor()] if admission else [])
    server = grpc.aio.server(interceptors=interceptors)
    server.add_generic_rpc_handlers((Handlers(),))
    address = f"unix:{directory}/{next(SOCKETS)}"
    server.add_insecure_port(address)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Client(channel)
    finally:
        await server.stop(0)


def raising(error: BaseException) -> Callable[[Any, Any], Awaitable[bytes]]:
    async def handler(request: bytes, context: Any) -> bytes:
        raise error

    return handler


async def failure(client: Client) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.unary()
    return caught.value


def details(error: grpc.aio.AioRpcError, kind: type[Any]) -> list[Any]:
    status = rpc_status.from_call(error)
    found = []
    for packed in status.details if status else []:
        message = kind()
        if packed.Unpack(message):
            found.append(message)
    return found


async def test_a_known_error_arrives_with_reason_metadata_and_hint(tmp_path: Path) -> None:
    async with serving(tmp_path, raising(ModelNotFound("llama", suggestions=["llama3", "llama2"]))) as client:
        error = await failure(client)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "model `llama` not found"
    (info,) = details(error, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("lmd", "MODEL_NOT_FOUND")
    assert dict(info.metadata) == {
        "name": "llama",
        "suggestions": "llama3,llama2",
        "hint": "did you mean `llama3` or `llama2`?",
    }


async def test_an_error_in_the_middle_of_a_stream_follows_what_was_sent(tmp_path: Path) -> None:
    async def handler(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"
        raise RunnerCrashed("m", cause="signal 11", log="the end")

    async with serving(tmp_path, handler, stream=True) as client:
        call = client.stream()
        assert [await call.read(), await call.read()] == [b"one", b"two"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    (info,) = details(caught.value, error_details_pb2.ErrorInfo)
    assert info.reason == "RUNNER_CRASHED"
    assert info.metadata["log"] == "the end"


async def test_a_wrong_field_is_a_bad_request(tmp_path: Path) -> None:
    async with serving(tmp_path, raising(InvalidRequest("`name` is missing", field="name"))) as client:
        error = await failure(client)
    (bad,) = details(error, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [("name", "`name` is missing")]


async def test_every_problem_of_a_modelfile_arrives(tmp_path: Path) -> None:
    problems = [ModelfileProblem(3, 7, "unknown parameter", "PARAMETER x 1"), ModelfileProblem(9, 1, "no", "FORM y")]
    async with serving(tmp_path, raising(ModelfileSyntax(problems))) as client:
        error = await failure(client)
    (bad,) = details(error, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [("3:7", "unknown parameter"), ("9:1", "no")]


async def test_a_delay_is_retry_info(tmp_path: Path) -> None:
    async with serving(tmp_path, raising(QueueFull(limit=8, retry_after_s=1.5))) as client:
        error = await failure(client)
    (retry,) = details(error, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize("error", [KeyError("/home/eve/secret"), LmdError("a reason was forgotten")])
async def test_a_defect_shows_an_id_and_nothing_else(tmp_path: Path, error: Exception) -> None:
    with structlog.testing.capture_logs() as logs:
        async with serving(tmp_path, raising(error)) as client:
            told = await failure(client)
    assert told.code() is grpc.StatusCode.INTERNAL
    (info,) = details(told, error_details_pb2.ErrorInfo)
    assert info.reason == "INTERNAL"
    assert set(info.metadata) == {"error_id", "hint"}
    assert "secret" not in str(told)
    (entry,) = logs
    assert entry["event"] == "rpc_failed"
    assert entry["method"] == "/test/Call"
    assert entry["error_id"] == info.metadata["error_id"]
    assert entry["exc_info"] is error


async def test_an_abort_of_the_handler_itself_passes(tmp_path: Path) -> None:
    async def handler(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "mine")
        return b""

    with structlog.testing.capture_logs() as logs:
        async with serving(tmp_path, handler) as client:
            error = await failure(client)
    assert (error.code(), error.details(), logs) == (grpc.StatusCode.OUT_OF_RANGE, "mine", [])


async def test_a_client_that_hangs_up_runs_the_handlers_cleanup_at_once(tmp_path: Path) -> None:
    """A generator that gRPC cancels during a write would otherwise be cleaned up by the garbage collector, if ever."""
    cleaned = asyncio.Event()

    async def handler(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 100_000
        finally:
            cleaned.set()

    with structlog.testing.capture_logs() as logs:
        async with serving(tmp_path, handler, stream=True) as client:
            call = client.stream()
            assert await call.read()
            call.cancel()
            async with asyncio.timeout(10):
                await cleaned.wait()
    assert logs == []


async def test_a_client_that_hung_up_before_a_write_is_no_defect(tmp_path: Path) -> None:
    """gRPC fails such a write with an internal error of its own; each one filled the log with a traceback."""
    running, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def finish_first() -> None:
        await go_on.wait()

    async def handler(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        running.set()
        finishing = asyncio.create_task(finish_first())
        while not finishing.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(finishing)
            go_on.set()
        try:
            yield b"too late"
        finally:
            ended.set()

    with structlog.testing.capture_logs() as logs:
        async with serving(tmp_path, handler, stream=True) as client:
            call = client.stream()
            assert await call.read() == b"first"
            await running.wait()
            call.cancel()
            async with asyncio.timeout(10):
                await ended.wait()
    assert logs == []


@pytest.mark.parametrize("text", ["x" * 100_000, "é" * 50_000, "\x00\n" * 9_999, "\ud800"])
async def test_nothing_outgrows_the_trailers(tmp_path: Path, text: str) -> None:
    problems = [ModelfileProblem(n, 1, text, "") for n in range(1, 400)]
    for error in (
        ModelfileSyntax(problems),
        InvalidRequest(text, field=text, hint=text),
        RunnerCrashed(text, cause=text, log=text),
    ):
        assert to_status(error).ByteSize() <= MAX_DETAILS_BYTES
        async with serving(tmp_path, raising(error)) as client:
            told = await failure(client)
        (info,) = details(told, error_details_pb2.ErrorInfo)
        assert info.reason == error.reason


async def test_new_work_is_refused_while_draining_and_running_work_goes_on(tmp_path: Path) -> None:
    admission = Admission()
    running, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request: bytes, context: Any) -> bytes:
        running.set()
        await go_on.wait()
        return b"done"

    async with serving(tmp_path, handler, admission=admission) as client:
        first = asyncio.ensure_future(client.unary())
        await running.wait()
        admission.drain()
        assert admission.running == 1
        refused = await failure(client)
        (info,) = details(refused, error_details_pb2.ErrorInfo)
        assert (refused.code(), info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        waiter = asyncio.create_task(admission.wait_idle())
        await asyncio.sleep(0)
        assert not waiter.done()
        go_on.set()
        assert await first == b"done"
        await waiter


@pytest.mark.parametrize(
    "method",
    [
        "/lmd.v1.SystemService/GetStatus",
        "/lmd.v1.SystemService/Shutdown",
        "/lmd.v1.RuntimeService/ListRunners",
        "/grpc.health.v1.Health/Check",
    ],
)
async def test_looking_is_allowed_while_draining(tmp_path: Path, method: str) -> None:
    admission = Admission()
    admission.drain()

    async def handler(request: bytes, context: Any) -> bytes:
        return b"seen"

    async with serving(tmp_path, handler, admission=admission) as client:
        assert await client.unary(method) == b"seen"


async def test_what_runs_when_the_time_is_over_ends_with_draining(tmp_path: Path) -> None:
    admission = Admission()

    async def handler(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.Event().wait()

    async with serving(tmp_path, handler, stream=True, admission=admission) as client:
        call = client.stream()
        assert await call.read() == b"first"
        admission.drain()
        admission.expire()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        (info,) = details(caught.value, error_details_pb2.ErrorInfo)
        assert info.reason == "DRAINING"
        await admission.wait_idle()
