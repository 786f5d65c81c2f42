"""Turns errors into gRPC statuses: the only place that knows both worlds.

Every status that leaves the daemon carries one `google.rpc.ErrorInfo` (domain "lmd"): its reason is a name of
`ErrorReason`, its metadata holds what the message says in words, and under "hint" what to do next. Some carry
`BadRequest` or `RetryInfo` beside it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from lmd.daemon.rpc_handlers import AroundInterceptor
from lmd.registry.errors import InvalidRequest, LmdError, ModelfileSyntax

log = structlog.get_logger(__name__)

DOMAIN = "lmd"
DETAILS_KEY = "grpc-status-details-bin"

#: Details travel in HTTP/2 trailers; gRPC clients drop calls whose trailers exceed 8 KiB. The message is sent twice
#: (percent-encoded as a trailer of its own), so both limits together stay below that.
MAX_DETAILS_BYTES = 4096
MAX_MESSAGE_BYTES = 768
MAX_METADATA_VALUE_BYTES = 1024

C = grpc.StatusCode
CODES: dict[str, grpc.StatusCode] = {
    "INVALID_MODEL_REF": C.INVALID_ARGUMENT,
    "INVALID_ARGUMENT": C.INVALID_ARGUMENT,
    "MODELFILE_SYNTAX": C.INVALID_ARGUMENT,
    "MODEL_NOT_FOUND": C.NOT_FOUND,
    "VERSION_NOT_FOUND": C.NOT_FOUND,
    "NOT_PINNED": C.FAILED_PRECONDITION,
    "TAG_CHANGED": C.ABORTED,
    "SOURCE_NOT_FOUND": C.NOT_FOUND,
    "SOURCE_ACCESS_DENIED": C.PERMISSION_DENIED,
    "SOURCE_UNAVAILABLE": C.UNAVAILABLE,
    "SOURCE_RATE_LIMITED": C.RESOURCE_EXHAUSTED,
    "SOURCE_INVALID": C.FAILED_PRECONDITION,
    "DOWNLOAD_DIGEST_MISMATCH": C.DATA_LOSS,
    "BLOB_MISSING": C.DATA_LOSS,
    "BLOB_CORRUPT": C.DATA_LOSS,
    "GGUF_INVALID": C.INVALID_ARGUMENT,
    "FILE_INVALID": C.INVALID_ARGUMENT,
    "FILE_CHANGED": C.ABORTED,
    "UPLOAD_REQUIRED": C.FAILED_PRECONDITION,
    "DISK_SPACE": C.RESOURCE_EXHAUSTED,
    "DEVICE_MEMORY": C.RESOURCE_EXHAUSTED,
    "DEVICE_UNAVAILABLE": C.UNAVAILABLE,
    "MODEL_INCOMPATIBLE": C.FAILED_PRECONDITION,
    "RUNNER_CRASHED": C.INTERNAL,
    "RUNNER_START_TIMEOUT": C.UNAVAILABLE,
    "RUNNER_HUNG": C.INTERNAL,
    "ENGINE_FAILED": C.INTERNAL,
    "CONTEXT_LENGTH_EXCEEDED": C.INVALID_ARGUMENT,
    "TEMPLATE_FAILED": C.FAILED_PRECONDITION,
    "CAPABILITY_MISSING": C.FAILED_PRECONDITION,
    "QUEUE_FULL": C.RESOURCE_EXHAUSTED,
    "DEADLINE_EXCEEDED": C.DEADLINE_EXCEEDED,
    "CLIENT_STALLED": C.ABORTED,
    # Not CANCELLED: that code says that the client itself hung up.
    "PULL_CANCELLED": C.ABORTED,
    "DRAINING": C.UNAVAILABLE,
    "UNLOADED": C.ABORTED,
    "PERMISSION_DENIED": C.PERMISSION_DENIED,
    "STORE_IO": C.INTERNAL,
    "INTERNAL": C.INTERNAL,
}


def to_status(error: LmdError) -> status_pb2.Status:
    """Return the status of *error* with its details, cut so that it fits into trailers."""
    metadata = {key: _cut(value, MAX_METADATA_VALUE_BYTES) for key, value in error.metadata.items()}
    if error.hint:
        metadata["hint"] = _cut(error.hint, MAX_METADATA_VALUE_BYTES)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    while info.ByteSize() > MAX_DETAILS_BYTES // 2:
        longest = max(info.metadata, key=lambda key: len(info.metadata[key]))
        info.metadata[longest] = _cut(info.metadata[longest], len(info.metadata[longest].encode()) // 2)
    code: int = CODES[error.reason].value[0]
    status = status_pb2.Status(code=code, message=_cut(error.message, MAX_MESSAGE_BYTES))
    status.details.add().Pack(info)
    for detail in _more_details(error):
        status.details.add().Pack(detail)
        if status.ByteSize() > MAX_DETAILS_BYTES:
            del status.details[-1]
    return status


def _more_details(error: LmdError) -> list[Message]:
    details: list[Message] = []
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        delay = Duration()
        delay.FromMicroseconds(round(max(retry_after_s, 0) * 1e6))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    violations: list[tuple[str, str]] = []
    if isinstance(error, ModelfileSyntax):
        violations = [(f"{problem.line}:{problem.column}", problem.message) for problem in error.problems]
    elif isinstance(error, InvalidRequest):
        violations = [(error.metadata["field"], error.message)]
    if violations:
        bad_request = error_details_pb2.BadRequest()
        for field, description in violations:
            violation = bad_request.field_violations.add(field=_cut(field, 128), description=_cut(description, 256))
            if bad_request.ByteSize() > MAX_DETAILS_BYTES // 4:
                bad_request.field_violations.remove(violation)
                break
        details.append(bad_request)
    return details


def _cut(text: str, limit: int) -> str:
    """Shorten *text* to *limit* bytes of UTF-8, between characters."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: max(limit - 3, 0)].decode(errors="ignore") + "…"


def _defect(method: str, error: Exception) -> LmdError:
    """Log an error that nobody expected, and return what the caller is told: nothing but where to look."""
    error_id = secrets.token_hex(6)
    log.error("rpc_failed", method=method, error_id=error_id, exc_info=error)
    return LmdError(
        "internal error in the daemon",
        hint=f"look for error_id {error_id} in the log of the daemon, and report what it says",
        metadata={"error_id": error_id},
    )


@asynccontextmanager
async def _translated(method: str, context: Any) -> AsyncIterator[None]:
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception as error:  # the boundary: whatever happens inside becomes a status
        expected = isinstance(error, LmdError) and error.reason in CODES and error.reason != "INTERNAL"
        told = error if isinstance(error, LmdError) and expected else _defect(method, error)
        status = to_status(told)
        await context.abort(CODES[told.reason], status.message, ((DETAILS_KEY, status.SerializeToString()),))


def error_interceptor() -> AroundInterceptor:
    """Return the interceptor that must be outermost, so that it translates what the others raise."""
    return AroundInterceptor(_translated)
