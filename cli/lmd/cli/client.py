"""The connection to the daemon: one channel over its unix socket, and errors in the client's own terms.

This module and `wire` know gRPC; commands see messages and `ClientError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

# gRPC's core writes about lost connections to stderr, which belongs to us; the errors say it better.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from lmd.cli.errors import API_MISMATCH, ClientError
from lmd.cli.wire import client_error
from lmd.v1 import system_service_pb2 as system_pb
from lmd.v1.system_service_pb2_grpc import SystemServiceStub
from lmd.v1.version import API_VERSION, __version__

if TYPE_CHECKING:
    from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub
    from lmd.v1.model_service_pb2_grpc import ModelServiceStub
    from lmd.v1.runtime_service_pb2_grpc import RuntimeServiceStub
    from lmd.v1.store_service_pb2_grpc import StoreServiceStub

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Event = TypeVar("Event", covariant=True)

#: A daemon answers this call from memory; one that does not is stuck.
_STATUS_TIMEOUT_S = 10.0

_CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # Templates, licences and long listings may pass the default of 4 MiB.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # Error details travel in the trailers; a Modelfile with many mistakes has many.
    ("grpc.max_metadata_size", 64 * 1024),
    ("grpc.absolute_max_metadata_size", 128 * 1024),
)


class _EventCall(Protocol[Event]):
    """What gRPC returns for a streaming call."""

    def __next__(self) -> Event: ...

    def cancel(self) -> object: ...


class EventStream(Generic[Event]):
    """The events of one streaming call. Leaving its `with` block hangs up."""

    def __init__(self, call: _EventCall[Event]) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            return next(self._call)
        except grpc.RpcError as error:
            raise client_error(error) from None

    def cancel(self) -> None:
        """Hang up; the next event is then an error of reason CANCELLED."""
        self._call.cancel()

    def __enter__(self) -> EventStream[Event]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """A daemon that answers and speaks this client's version of the API. *status* is what it said of itself."""

    def __init__(self, channel: grpc.Channel, socket: Path, status: system_pb.GetStatusResponse) -> None:
        self._channel = channel
        self.socket = socket
        self.status = status

    @classmethod
    def connect(cls, socket: Path, *, timeout_s: float = _STATUS_TIMEOUT_S) -> Client:
        """Connect to the daemon at *socket*, whose owner the caller has checked.

        Raises:
            ClientError: it does not answer, or speaks another version of the API.
        """
        channel = grpc.insecure_channel(f"unix:{socket}", options=_CHANNEL_OPTIONS)
        try:
            status = SystemServiceStub(channel).GetStatus(system_pb.GetStatusRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            channel.close()
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise _api_mismatch("another version", "which", server_is_newer=False) from None
            raise client_error(error) from None
        except BaseException:
            channel.close()
            raise
        if status.api_version != API_VERSION:
            channel.close()
            raise _api_mismatch(
                f"version {status.api_version}",
                f"lmd {status.version}",
                server_is_newer=status.api_version > API_VERSION,
            )
        return cls(channel, socket, status)

    @cached_property
    def models(self) -> ModelServiceStub:
        """The calls on names and pulls."""
        from lmd.v1.model_service_pb2_grpc import ModelServiceStub

        return ModelServiceStub(self._channel)

    @cached_property
    def runtime(self) -> RuntimeServiceStub:
        """The calls on resident models."""
        from lmd.v1.runtime_service_pb2_grpc import RuntimeServiceStub

        return RuntimeServiceStub(self._channel)

    @cached_property
    def inference(self) -> InferenceServiceStub:
        """The calls that answer."""
        from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub

        return InferenceServiceStub(self._channel)

    @cached_property
    def store(self) -> StoreServiceStub:
        """The calls on stored bytes."""
        from lmd.v1.store_service_pb2_grpc import StoreServiceStub

        return StoreServiceStub(self._channel)

    @cached_property
    def system(self) -> SystemServiceStub:
        """The calls on the daemon itself."""
        return SystemServiceStub(self._channel)

    def call(self, method: Callable[[Request], Reply], request: Request) -> Reply:
        """Return the reply of a unary call.

        Raises:
            ClientError: the call fails.
        """
        try:
            return method(request)
        except grpc.RpcError as error:
            raise client_error(error) from None

    def stream(self, method: Callable[[Request], _EventCall[Event]], request: Request) -> EventStream[Event]:
        """Start a streaming call and return its events."""
        return EventStream(method(request))

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _api_mismatch(spoken: str, server: str, *, server_is_newer: bool) -> ClientError:
    if server_is_newer:
        hint = f"update `lm` (this is {__version__}, the daemon is {server})"
    else:
        hint = f"update the daemon and restart it (this `lm` is {__version__})"
    return ClientError(
        f"the daemon speaks {spoken} of the API, this `lm` speaks version {API_VERSION}",
        reason=API_MISMATCH,
        hint=hint,
        metadata={"client_api_version": str(API_VERSION), "client_version": __version__},
    )
