"""Bringing a local file into the store: the daemon opens it itself where it may, or gets the bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import grpc

from lmd.cli.errors import ClientError
from lmd.cli.progress import Reporter
from lmd.cli.wire import client_error
from lmd.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from lmd.cli.client import Client

_PIECE_BYTES = 1024 * 1024
_BEAT_S = 0.1


def store_file(client: Client, path: Path, reporter: Reporter) -> str:
    """Store the file and return its digest.

    Raises:
        ClientError: it cannot be read or stored.
    """
    try:
        return _store(client, path, reporter)
    except ClientError as error:
        if error.reason != "GGUF_INVALID":
            raise
        # The daemon knows bytes, and of several files in a Modelfile it is this one.
        raise ClientError(
            f"{path}: {error.message}", reason=error.reason, hint=error.hint, metadata=error.metadata
        ) from None


def _store(client: Client, path: Path, reporter: Reporter) -> str:
    if client.status.uid == os.getuid():
        try:
            return _import(client, path, reporter)
        except ClientError as error:
            if error.reason != "UPLOAD_REQUIRED":
                raise
    return _upload(client, path, reporter)


def _import(client: Client, path: Path, reporter: Reporter) -> str:
    with client.stream(client.models.ImportFile, pb.ImportFileRequest(path=str(path))) as events:
        for event in events:
            if event.HasField("progress"):
                reporter.progress(event.progress)
            elif event.HasField("blob"):
                return event.blob.digest
    raise ClientError("the daemon ended the import without a result", reason="INTERNAL")


class _Pieces:
    """The messages of one upload. gRPC takes them in a thread of its own, so errors wait here for the caller."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._before = os.fstat(descriptor)
        self.size_bytes = self._before.st_size
        self.sent_bytes = 0
        self.failure: ClientError | None = None

    def __iter__(self) -> Iterator[pb.UploadBlobRequest]:
        yield pb.UploadBlobRequest(size_bytes=self.size_bytes)
        while self.sent_bytes < self.size_bytes:
            data = os.pread(self._descriptor, min(_PIECE_BYTES, self.size_bytes - self.sent_bytes), self.sent_bytes)
            if not data:
                self._fail("the file became shorter while it was read")
            self.sent_bytes += len(data)
            if self.sent_bytes == self.size_bytes:
                # Before the last piece goes out: an upload that lacks it is refused, whereas a call that is taken back
                # after its last byte can look like one that is complete.
                self._check_unchanged()
            yield pb.UploadBlobRequest(data=data)

    def _check_unchanged(self) -> None:
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._before.st_size, self._before.st_mtime_ns):
            self._fail("the file changed while it was read")

    def _fail(self, message: str) -> NoReturn:
        self.failure = ClientError(message, reason="FILE_CHANGED", hint="wait until its writer is done, then try again")
        raise self.failure


def _upload(client: Client, path: Path, reporter: Reporter) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ClientError(f"cannot read {path}: {error.strerror}", reason="FILE_INVALID") from error
    try:
        pieces = _Pieces(descriptor)
        size_bytes = pieces.size_bytes
        call = client.models.UploadBlob.future(iter(pieces))
        try:
            while True:
                reporter.progress(_progress(path, pieces.sent_bytes, size_bytes, pb.PullProgress.STATE_DOWNLOADING))
                try:
                    digest = call.result(timeout=_BEAT_S).blob.digest
                    break
                except grpc.FutureTimeoutError:
                    continue
        except grpc.RpcError as error:
            raise pieces.failure or client_error(error) from None
        finally:
            call.cancel()
        reporter.progress(_progress(path, size_bytes, size_bytes, pb.PullProgress.STATE_DONE))
        return digest
    finally:
        os.close(descriptor)


def _progress(
    path: Path, completed_bytes: int, total_bytes: int, state: pb.PullProgress.State.ValueType
) -> pb.PullProgress:
    return pb.PullProgress(filename=path.name, completed_bytes=completed_bytes, total_bytes=total_bytes, state=state)
