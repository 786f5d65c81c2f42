"""From a failed call to a `ClientError`: decodes the rich status that the daemon sends in the trailers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import grpc

from lmd.cli.errors import ClientError, Unreachable, Violation

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as AnyMessage

_DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "lmd"

#: How gRPC's own refusal of a request begins.
_TOO_LARGE = "SERVER: Received message larger than max"

#: The reason of a call that this side hung up on.
CANCELLED = "CANCELLED"


def client_error(error: grpc.RpcError) -> ClientError:
    """Return what *error* means. Statuses that carry no ErrorInfo come from gRPC itself, not from the daemon."""
    message = error.details() or "the daemon gives no reason"
    rich = _from_trailers(message, error.trailing_metadata() or ())
    if rich is not None:
        return rich
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(
            "the connection to the daemon is lost",
            hint="look at its log, or run the command again",
            context=[message],
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unreachable("the daemon does not answer", hint="look at its log, or restart it")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ClientError(
            "the daemon does not know this call",
            reason=code.name,
            hint="`lm version` compares both sides; update the older one",
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and message.startswith(_TOO_LARGE):
        return ClientError(
            "the request is larger than the daemon accepts",
            reason="INVALID_ARGUMENT",
            hint="a prompt with its chat, or a Modelfile, must stay below 4 MiB",
        )
    return ClientError(message, reason=code.name)


def _from_trailers(message: str, trailers: Iterable[Any]) -> ClientError | None:
    for key, value in trailers:
        if key == _DETAILS_KEY:
            from google.protobuf.message import DecodeError
            from google.rpc.status_pb2 import Status

            try:
                status = Status.FromString(value)
            except DecodeError:
                return None
            return _from_details(status.message or message, status.details)
    return None


def _from_details(message: str, details: Iterable[AnyMessage]) -> ClientError | None:
    from google.rpc import error_details_pb2

    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    known = False
    for detail in details:
        known = detail.Unpack(info) or known
        detail.Unpack(bad_request)
        detail.Unpack(retry)
    if not known or info.domain != _DOMAIN:
        return None
    metadata = dict(info.metadata)
    hint = metadata.pop("hint", "")
    wait_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    if wait_s and not hint:
        hint = f"try again in {wait_s:.0f} s"
    return ClientError(
        message,
        reason=info.reason,
        hint=hint,
        metadata=metadata,
        violations=[Violation(v.field, v.description) for v in bad_request.field_violations],
    )
