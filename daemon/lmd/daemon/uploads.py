"""Takes in files for `lm create`: sent by the client, or opened by the daemon where that is safe."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from lmd.daemon.access import check_may_open
from lmd.daemon.blocking import BlockingPool
from lmd.daemon.callers import Caller
from lmd.daemon.reporting import Finished, Progress, reports_of
from lmd.daemon.tasks import to_the_end
from lmd.registry.digest import Digest
from lmd.registry.errors import DigestMismatch, InvalidRequest
from lmd.registry.pull import PullEvent, PullState
from lmd.registry.sources.file import read_file_headers
from lmd.registry.store import Ingest, Lease, Reservation, Store

log = structlog.get_logger(__name__)

MAX_CHUNK_BYTES = 1 << 20
#: An upload of unknown size sets this much space aside at a time.
RESERVED_STEP_BYTES = 64 << 20
#: How long a blob waits for the model that will refer to it.
LEASE_S = 3600.0
#: Imports read and write a whole disk's worth: more at once are no faster and take threads from everyone else.
MAX_IMPORTS = 2


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Bytes that are now in the store."""

    digest: Digest
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an upload; *size_bytes* is the size of the whole and counts on the first piece."""

    size_bytes: int
    data: bytes


class Uploads:
    """Stores files and keeps each for an hour, so that a model can be made of it."""

    def __init__(self, store: Store, pool: BlockingPool) -> None:
        self._store = store
        self._pool = pool
        self._importing = asyncio.Semaphore(MAX_IMPORTS)
        self._lock = threading.Lock()  # protects the leases, which pool threads change
        self._leases: dict[Digest, Lease] = {}
        self._timers: dict[Digest, asyncio.TimerHandle] = {}  # of the loop's thread

    async def receive(self, chunks: AsyncIterator[Chunk]) -> StoredBlob:
        """Store what *chunks* bring; of an upload that is cut off nothing stays.

        Raises: InvalidRequest when the sizes are not as announced, DiskFull before the first byte, StoreError.
        """
        first = await anext(chunks, None)
        if first is None or first.size_bytes <= 0:
            raise InvalidRequest("the first message of an upload must tell its size", field="size_bytes")

        async def pieces() -> AsyncGenerator[bytes]:
            yield first.data
            async for chunk in chunks:
                yield chunk.data

        async with aclosing(pieces()) as data:
            return await self.store(data, size_bytes=first.size_bytes)

    async def store(
        self, pieces: AsyncIterator[bytes], *, size_bytes: int | None, expected: Digest | None = None
    ) -> StoredBlob:
        """Store what *pieces* of at most `MAX_CHUNK_BYTES` add up to; of an upload that is cut off nothing stays.

        *size_bytes* is the size of the whole, None when only its end will tell; *expected* is what it must hash to.

        Raises: InvalidRequest when the size is not as announced, DigestMismatch, DiskFull (before the first byte when
        the size is known), StoreError.
        """
        reception = _Reception(self._store, size_bytes)
        try:
            await self._pool.run(reception.open)
            async for piece in pieces:
                await self._pool.run(reception.take, piece)
            blob = reception.blob()
            if expected is not None and blob.digest != expected:
                raise DigestMismatch(expected=str(expected), actual=str(blob.digest), what="the upload")
            await to_the_end(self._hold(blob.digest))
            await self._pool.run(reception.commit, blob)
        finally:
            await to_the_end(self._pool.run(reception.close))
        log.info("upload_stored", digest=str(blob.digest), size_bytes=blob.size_bytes)
        return blob

    async def keep(self, digest: Digest) -> bool:
        """Keep a blob that is here as if it had just been uploaded, and tell whether it is here.

        A client that finds its file in the store does not send it again, so what it found must still be there when it
        makes a model of it.
        """
        if not await self._pool.run(self._store.has_blob, digest, None):
            return False
        await to_the_end(self._hold(digest))
        return await self._pool.run(self._store.has_blob, digest, None)

    async def import_file(self, path: Path, caller: Caller) -> AsyncGenerator[PullEvent | StoredBlob]:
        """Store the GGUF file at *path*; yields progress, then the blob. Closing the iterator gives the import up.

        Raises: UploadRequired, InvalidRequest, FileInvalid, GgufInvalid, FileChanged, DiskFull, StoreError.
        """
        check_may_open(path, caller, "path")
        await self._pool.run(read_file_headers, (path,))
        event = PullEvent("", path.name, 0, 0, PullState.DOWNLOADING, 0, "")

        async def work(on_progress: Progress) -> StoredBlob:
            cancelled = threading.Event()
            async with self._importing:
                digest, size_bytes = await self._pool.run_cancellable(
                    cancelled, self._store.import_file, path, on_progress=on_progress, cancelled=cancelled
                )
                await to_the_end(self._hold(digest))
            return StoredBlob(digest, size_bytes)

        yield event
        async with aclosing(reports_of(work, "import")) as reports:
            async for report in reports:
                if isinstance(report, Finished):
                    blob = report.result
                else:
                    yield replace(event, completed_bytes=report[0], total_bytes=report[1])
        yield PullEvent(str(blob.digest), path.name, blob.size_bytes, blob.size_bytes, PullState.DONE, 0, "")
        yield blob

    def release(self, digests: Iterable[Digest]) -> None:
        """Give up the leases of blobs that a model refers to by now. Not for the loop's thread: it writes the index."""
        with self._lock:
            leases = [self._leases.pop(digest) for digest in set(digests) & self._leases.keys()]
        for lease in leases:
            lease.release()

    async def _hold(self, digest: Digest) -> None:
        """Keep *digest*; a lease that nobody holds any more ends by itself."""
        lease = await self._pool.run(self._lease, digest)
        if (before := self._timers.pop(digest, None)) is not None:
            before.cancel()
        self._timers[digest] = asyncio.get_running_loop().call_later(LEASE_S, self._let_go, digest, lease)

    def _lease(self, digest: Digest) -> Lease:
        lease = self._store.lease(f"upload {digest}", LEASE_S)
        lease.add(digest)
        with self._lock:
            before = self._leases.get(digest)
            self._leases[digest] = lease
        if before is not None:
            before.release()
        return lease

    def _let_go(self, digest: Digest, lease: Lease) -> None:
        self._timers.pop(digest, None)
        with self._lock:
            if self._leases.get(digest) is lease:
                del self._leases[digest]


class _Reception:
    """An upload under way; *size_bytes* is None while nobody knows. One call at a time, each in some pool thread."""

    def __init__(self, store: Store, size_bytes: int | None) -> None:
        self._store = store
        self._size_bytes = size_bytes
        self._received_bytes = 0
        self._hash = hashlib.sha256()
        self._reservation: Reservation | None = None
        self._ingest: Ingest | None = None

    def open(self) -> None:
        """Set the space aside, then begin. Raises: DiskFull."""
        self._reserve(RESERVED_STEP_BYTES if self._size_bytes is None else self._size_bytes)
        self._ingest = self._store.begin_ingest(f"upload-{secrets.token_hex(8)}", total_bytes=self._size_bytes)

    def take(self, data: bytes) -> None:
        """Append *data*. Raises: InvalidRequest, DiskFull, StoreError."""
        assert self._ingest is not None, "take() before open()"
        assert self._reservation is not None, "take() before open()"
        if len(data) > MAX_CHUNK_BYTES:
            raise InvalidRequest(f"a piece of an upload has at most {MAX_CHUNK_BYTES} bytes", field="data")
        if self._size_bytes is not None and self._received_bytes + len(data) > self._size_bytes:
            raise InvalidRequest(f"more bytes came than the {self._size_bytes} announced", field="size_bytes")
        if self._size_bytes is None and self._reservation.size_bytes < len(data):
            self._reserve(RESERVED_STEP_BYTES)
        self._ingest.write(self._received_bytes, data)
        self._hash.update(data)
        self._received_bytes += len(data)
        self._reservation.shrink(len(data))

    def blob(self) -> StoredBlob:
        """Return what the whole is. Raises: InvalidRequest when some of it is missing."""
        if self._size_bytes is not None and self._received_bytes != self._size_bytes:
            raise InvalidRequest(
                f"the upload ended after {self._received_bytes} of {self._size_bytes} bytes", field="size_bytes"
            )
        return StoredBlob(Digest.from_hex(self._hash.hexdigest()), self._received_bytes)

    def commit(self, blob: StoredBlob) -> None:
        """Make the whole a blob."""
        assert self._ingest is not None, "commit() before open()"
        self._ingest.commit(blob.digest, blob.size_bytes)
        self._ingest = None

    def _reserve(self, size_bytes: int) -> None:
        if self._reservation is not None:
            self._reservation.release()
        self._reservation = self._store.reserve(size_bytes, "upload")

    def close(self) -> None:
        """Discard what is not committed, and give the space back."""
        ingest, self._ingest = self._ingest, None
        reservation, self._reservation = self._reservation, None
        try:
            if ingest is not None:
                ingest.discard()
        finally:
            if reservation is not None:
                reservation.release()
