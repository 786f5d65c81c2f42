"""Looking at a model that is not here: its header, in one request for each file, and nothing of its weights."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from lmd.registry.cancel import CancelScope
from lmd.registry.errors import SourceInvalid
from lmd.registry.gguf import GgufHeader, combine, read_header
from lmd.registry.gguf_cursor import Limits
from lmd.registry.http import Http, Reply
from lmd.registry.http_headers import parse_content_range, parse_length
from lmd.registry.parameters import ParameterValue
from lmd.registry.planning import PullPlan
from lmd.registry.remote_file import RemoteFile
from lmd.registry.sources.refusals import blamed_on

#: What may be fetched of one file. The largest tokenizers of mid 2026 make headers of some 20 MB.
MAX_HEADER_BYTES = 64 << 20
_LIMITS = Limits(max_header_bytes=MAX_HEADER_BYTES)
_CHUNK_BYTES = 64 << 10
#: Stands for the size of a file whose source does not say it, while its header is read.
_ANY_SIZE = 1 << 62


@dataclass(frozen=True, slots=True)
class PeekedModel:
    """A model that is at its source, as far as its header tells.

    name: the tag that a pull would set.
    header: that of the whole model, shards combined.
    parameters: the settings that a pull would take over from the source.
    download_bytes: what a pull would still have to fetch.
    """

    name: str
    header: GgufHeader
    parameters: Mapping[str, ParameterValue]
    download_bytes: int


def peek_plan(
    http: Http, plan: PullPlan, cancel: CancelScope, present: Mapping[str, GgufHeader]
) -> tuple[GgufHeader, int]:
    """Return the header of the weights of *plan*, and the bytes of all its files that are not *present*; one try.

    *present* are the headers of files that are here already, by their key. Nothing is read of files that are no
    weights.

    Raises:
        SourceError: the source refuses, fails, or must not be trusted.
        GgufInvalid: a file is no GGUF, or its header is larger than `MAX_HEADER_BYTES`.
        PullCancelled: cancelled.
    """
    headers = []
    missing_bytes = 0
    for file in plan.files:
        if file.role != "weights":
            missing_bytes += 0 if file.key in present else file.size_bytes or 0
        elif file.key in present:
            headers.append(present[file.key])
        else:
            headers.append(peek_header(http, file.remote, cancel))
            missing_bytes += headers[-1].file_size
    return combine(headers), missing_bytes


def peek_header(http: Http, remote: RemoteFile, cancel: CancelScope) -> GgufHeader:
    """Read the header of a file at its source; one try.

    The bytes are asked for in one range, and no more of it is taken than the header has: it ends somewhere in it.

    Raises: as `peek_plan`.
    """
    with ExitStack() as stack, blamed_on(remote.ref):
        beginning = _Beginning(http, remote, cancel)
        stack.callback(beginning.hang_up)
        size_bytes = beginning.begin()
        header = read_header(beginning, size_bytes or _ANY_SIZE, _LIMITS)
    if size_bytes is None:
        ends = (header.data_offset + tensor.offset + tensor.size_bytes for tensor in header.tensors)
        header = replace(header, file_size=max(ends, default=header.data_offset))
    return header


class _Beginning(io.BytesIO):
    """The first bytes of a remote file, which arrive as they are read."""

    def __init__(self, http: Http, remote: RemoteFile, cancel: CancelScope) -> None:
        super().__init__()
        self._http = http
        self._remote = remote
        self._cancel = cancel
        self._reply: Reply | None = None
        self._have_bytes = 0
        self._view = memoryview(bytearray(_CHUNK_BYTES))

    def begin(self) -> int | None:
        """Ask for the bytes; return the size of the whole file, None when the source does not say."""
        reply = self._ask()
        if self._remote.size_bytes is not None:
            return self._remote.size_bytes
        if reply.status == 200:
            return parse_length(reply.headers.get("content-length"))
        part = parse_content_range(reply.headers.get("content-range"))
        return None if part is None else part.total_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        """Return at least one of the next *size* bytes, waiting for it; b"" at the end of the file."""
        place = self.tell()
        while self._have_bytes <= place and self._receive():
            pass
        return super().read(size)

    def hang_up(self) -> None:
        """Close the connection, on which the rest of the range would come."""
        if self._reply is not None:
            self._reply.close()
            self._reply = None

    def _receive(self) -> bool:
        """Append what comes next; tell whether there was anything."""
        self._cancel.check()
        end = self._end()
        if self._have_bytes >= end:
            return False
        reply = self._reply or self._ask()
        count = reply.read_into(self._view[: end - self._have_bytes])
        if count == 0:
            # A source may send less than a range; the rest is asked for then, as long as it sends anything.
            self.hang_up()
            if reply.status == 200:
                return False
            reply = self._ask()
            count = reply.read_into(self._view[: end - self._have_bytes])
            if count == 0:
                raise SourceInvalid(f"the source sends an empty part of {self._remote.what}", ref=self._remote.ref)
        place = self.tell()
        self.seek(0, io.SEEK_END)
        self.write(self._view[:count])
        self.seek(place)
        self._have_bytes += count
        return True

    def _end(self) -> int:
        size_bytes = self._remote.size_bytes
        return MAX_HEADER_BYTES if size_bytes is None else min(size_bytes, MAX_HEADER_BYTES)

    def _ask(self) -> Reply:
        remote, start, end = self._remote, self._have_bytes, self._end()
        headers = {"Range": f"bytes={start}-{end - 1}"}
        if remote.validator is not None:
            headers["If-Range"] = remote.validator
        reply = self._http.follow(
            "GET",
            remote.url,
            cancel=self._cancel,
            headers=headers,
            credentials=remote.credentials,
            on_redirect=remote.check_redirect,
        )
        try:
            in_part = remote.check_part(reply, start, end)
            if not in_part and start:
                raise SourceInvalid(f"the source cannot send parts of {remote.what}", ref=remote.ref)
        except BaseException:
            reply.close()
            raise
        self._reply = reply
        return reply
