"""Fetching one file: several ranges at once, hashed on the way, resumed where an earlier try ended.

Workers receive ranges into their own buffers and write them to the ingest; the calling thread follows the contiguous
front, reads it back from the page cache and hashes it. Receiving, writing and hashing all release the GIL, so they
run beside each other, and memory stays at one buffer per thread however large the file is.

Only bytes that the ingest has noted count: a resumed transfer asks for the rest and hashes what is there again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmd.registry.addresses import without_secrets
from lmd.registry.cancel import CancelScope
from lmd.registry.digest import Digest
from lmd.registry.errors import (
    DigestMismatch,
    GgufInvalid,
    LmdError,
    PullCancelled,
    SourceError,
    SourceInvalid,
    SourceRateLimited,
    SourceUnavailable,
)
from lmd.registry.http import Http, Reply
from lmd.registry.remote_file import RemoteFile
from lmd.registry.retry import RetryBudget, RetryPolicy
from lmd.registry.segments import Segment, Segments, segment_bytes_for
from lmd.registry.sources.refusals import blamed_on

if TYPE_CHECKING:
    from lmd.registry.store import Ingest

_log = logging.getLogger(__name__)

BUFFER_BYTES = 1 << 20
#: What has arrived is written and noted at least this often, so that little is lost when the process dies.
FLUSH_S = 0.25
PROGRESS_S = 0.2
#: After this much, or this long, what arrived is made durable against a power cut.
CHECKPOINT_BYTES = 256 << 20
CHECKPOINT_S = 30.0


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How hard to try.

    connections: ranges fetched at once, at most.
    stall_timeout_s: silence of a connection before it is dropped; also the window of the minimum rate.
    min_rate_bytes_per_s: a connection slower than this for a whole window counts as stalled.
    max_bytes: the largest file that is accepted.
    segment_bytes: how much one request asks for; None picks it by the size of the file.
    """

    connections: int = 4
    stall_timeout_s: float = 30.0
    min_rate_bytes_per_s: int = 512
    max_bytes: int = 4 << 40
    segment_bytes: int | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)


class _Restart(Exception):
    """The source sends the whole file whatever is asked: what arrived so far is of no use."""


class _TooSlow(SourceUnavailable):
    """Raised for a connection below the minimum rate: what it delivered does not count as progress."""


class Transfer:
    """One file's transfer into an ingest. Use once; `run` blocks, *stop* ends it from any thread.

    *on_progress* is called from the thread of `run` with the bytes received, a few times a second; *on_retry* from
    any thread, before a wait.
    """

    def __init__(
        self,
        http: Http,
        remote: RemoteFile,
        ingest: Ingest,
        options: TransferOptions,
        *,
        stop: threading.Event,
        on_progress: Callable[[int], None],
        on_retry: Callable[[SourceError], None],
    ) -> None:
        self._http = http
        self._remote = remote
        self._ingest = ingest
        self._options = options
        self._stop = stop
        self._on_progress = on_progress
        self._on_retry = on_retry
        self._ranges_work = True
        self._whole_budget = RetryBudget(options.retry)
        # Guards what follows; notified when the front moves, the last byte arrives, or a worker fails.
        self._changed = threading.Condition()
        self._segments: Segments | None = None
        self._front = 0
        self._received = 0
        #: The most bytes any try had: what counts as progress.
        self._most_received = 0
        self._ended = False
        self._error: BaseException | None = None
        #: Where redirects led; None asks the source again.
        self._location: str | None = None
        self._unsynced = 0
        self._workers: list[threading.Thread] = []

    def run(self) -> tuple[Digest, int]:
        """Fetch, verify, and return digest and size; the caller commits the ingest.

        When it fails, what arrived stays in the ingest for resume, unless it turned out to be wrong.

        Raises:
            SourceError: the source refuses, makes no progress for the whole retry budget, or must not be trusted.
            DigestMismatch, GgufInvalid: the content is not what was announced.
            DiskFull, StoreError: it cannot be written.
            PullCancelled: *stop* was set.
        """
        resumed = self._ingest.received_bytes > 0
        while True:
            try:
                return self._attempt()
            except _Restart:
                _log.info("%s: the source sends whole files only", without_secrets(self._remote.url))
                resumed, self._ranges_work = False, False
                self._ingest.reset()
            except (DigestMismatch, GgufInvalid):
                self._ingest.reset()
                if not resumed:
                    raise
                # Perhaps not the source is to blame but what was kept from an earlier try.
                _log.warning("%s: what was resumed is damaged", without_secrets(self._remote.url))
                resumed = False

    # The calling thread: hashing.

    def _attempt(self) -> tuple[Digest, int]:
        size = self._remote.size_bytes
        self._error, self._ended, self._front = None, False, 0
        if self._ranges_work and size is not None:
            step = self._options.segment_bytes or segment_bytes_for(size)
            self._segments = Segments(size, self._ingest.received(), step)
            self._received, self._front = self._segments.received_bytes, self._segments.front
            self._ended = self._segments.complete
        else:
            self._ingest.reset()
            self._segments, self._received = None, 0
        self._most_received = max(self._most_received, self._received)
        quit_workers = threading.Event()
        with CancelScope(quit_workers) as scope, CancelScope(self._stop) as outer:
            outer.call(quit_workers.set)
            outer.call(self._wake)
            checkpoints = threading.Thread(target=self._checkpoint, args=(quit_workers,), name="lmd-checkpoint")
            checkpoints.start()
            try:
                if not self._ended:
                    self._start_worker(scope, first=True)
                result = self._hash()
                # Let them give their connections back before the scope closes what it still holds.
                self._join_workers()
                return result
            finally:
                quit_workers.set()
                self._join_workers()
                checkpoints.join()

    def _hash(self) -> tuple[Digest, int]:
        remote = self._remote
        sha256 = hashlib.sha256()
        sha1 = hashlib.sha1(b"blob %d\0" % (remote.size_bytes or 0), usedforsecurity=False) if remote.git_sha1 else None
        view = memoryview(bytearray(BUFFER_BYTES))
        hashed = 0
        reported_at = 0.0
        while True:
            with self._changed:
                idle = self._front == hashed and not self._ended
                if idle and self._error is None and not self._stop.is_set():
                    self._changed.wait(PROGRESS_S)
                front, received, ended = self._front, self._received, self._ended
                error = self._error
            if self._stop.is_set():
                raise PullCancelled
            if error is not None:
                raise error
            # One buffer per round, so that cancel, errors and progress are never far.
            if hashed < front:
                count = os.preadv(self._ingest.fd, [view[: front - hashed]], hashed)
                if count == 0:
                    raise _Restart
                if hashed == 0 and count >= len(remote.magic):
                    remote.check_start(bytes(view[:16]))
                sha256.update(view[:count])
                if sha1 is not None:
                    sha1.update(view[:count])
                hashed += count
            if time.monotonic() - reported_at >= PROGRESS_S:
                reported_at = time.monotonic()
                self._on_progress(received)
            if ended and hashed == received:
                break
        if hashed < len(remote.magic):
            raise GgufInvalid(f"the file has only {hashed} bytes")
        self._on_progress(hashed)
        return remote.check_digests(sha256.hexdigest(), sha1.hexdigest() if sha1 else None), hashed

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _join_workers(self) -> None:
        # A worker may start others until it ends.
        while self._workers:
            self._workers.pop(0).join()

    # The workers.

    def _start_worker(self, scope: CancelScope, *, first: bool = False) -> None:
        target = self._fetch_whole if self._segments is None else self._fetch_ranges
        worker = threading.Thread(target=self._guarded, args=(target, scope, first), name="lmd-fetch")
        self._workers.append(worker)
        worker.start()

    def _guarded(self, target: Callable[[CancelScope, bool], None], scope: CancelScope, first: bool) -> None:
        """Run a worker; what ends it ends the transfer."""
        try:
            target(scope, first)
        except BaseException as error:
            with self._changed:
                # Errors after the first are its consequences: sockets closed under the other workers.
                if self._error is None and not scope.cancelled:
                    self._error = error
                self._changed.notify_all()

    def _fetch_ranges(self, scope: CancelScope, first: bool) -> None:
        segments = self._segments
        assert segments is not None
        view = memoryview(bytearray(BUFFER_BYTES))
        budget = RetryBudget(self._options.retry)
        while True:
            with self._changed:
                segment = segments.take()
            if segment is None:
                return
            while segment.missing_bytes:
                before = self._most_received
                try:
                    with blamed_on(self._remote.ref), self._request(scope, segment) as reply:
                        if first:
                            # Only now is it known that the source serves ranges.
                            first = False
                            self._start_helpers(scope, segments)
                        self._receive(reply, view, segment, scope)
                except SourceError as error:
                    self._back_off(error, budget, scope, before)

    def _start_helpers(self, scope: CancelScope, segments: Segments) -> None:
        with self._changed:
            wanted = min(self._options.connections - 1, segments.pending_count)
        for _ in range(wanted):
            self._start_worker(scope)

    def _fetch_whole(self, scope: CancelScope, _first: bool) -> None:
        """Receive a file of unknown size, or from a source without ranges, in one stream."""
        view = memoryview(bytearray(BUFFER_BYTES))
        remote = self._remote
        whole = Segment(0, self._options.max_bytes if remote.size_bytes is None else remote.size_bytes, 0)
        before = self._most_received
        try:
            with blamed_on(remote.ref), self._request(scope, None) as reply:
                self._receive(reply, view, whole, scope)
                if reply.remaining_bytes != 0 and not whole.missing_bytes and reply.read_into(view[:1]):
                    raise SourceInvalid(f"{remote.what} is longer than announced", ref=remote.ref)
                if remote.size_bytes is not None and whole.missing_bytes:
                    raise SourceUnavailable(f"{remote.what} ended early", ref=remote.ref, hint="pull again")
        except SourceError as error:
            self._back_off(error, self._whole_budget, scope, before)
            # The next try sends everything again, and the hasher must start over with it.
            raise _Restart from error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _back_off(self, error: SourceError, budget: RetryBudget, scope: CancelScope, before: int) -> None:
        """Wait before the next try, or raise *error* when another cannot help or the budget is spent."""
        scope.check()
        if not isinstance(error, (SourceUnavailable, SourceRateLimited)):
            raise error
        # Ask the source again where the bytes are: a signed URL may have expired, a storage node may be down.
        self._location = None
        progressed = self._most_received > before and not isinstance(error, _TooSlow)
        wait_s = budget.after_failure(error, progressed=progressed)
        _log.info("%s: %s; next try in %.1f s", without_secrets(self._remote.url), error.message, wait_s)
        self._on_retry(error)
        scope.wait(wait_s)

    # One request.

    def _request(self, scope: CancelScope, segment: Segment | None) -> Reply:
        """Ask for the rest of a segment, or for everything, and return a checked reply.

        Raises:
            SourceError, TransportFailed, ReplyRefused: there is no reply to use.
            _Restart: the source ignores ranges.
        """
        remote = self._remote
        headers: dict[str, str] = {}
        if segment is not None:
            headers["Range"] = f"bytes={segment.position}-{segment.end - 1}"
            if remote.validator is not None:
                headers["If-Range"] = remote.validator
        reply = self._http.follow(
            "GET",
            self._location or remote.url,
            cancel=scope,
            headers=headers,
            credentials=remote.credentials,
            on_redirect=remote.check_redirect,
        )
        try:
            if segment is None:
                remote.check_whole(reply, self._options.max_bytes)
            elif not remote.check_part(reply, segment.position, segment.end):
                raise _Restart
        except BaseException:
            reply.drain()
            reply.close()
            raise
        self._location = reply.url
        return reply

    def _receive(self, reply: Reply, view: memoryview, segment: Segment, scope: CancelScope) -> None:
        """Move a reply's body into the ingest until the segment is full or the body ends.

        Raises:
            TransportFailed, SourceUnavailable: the connection broke, stalled or is too slow; what it brought is noted.
        """
        options, remote = self._options, self._remote
        fill = window_bytes = 0
        window_start = flushed_at = time.monotonic()
        try:
            while fill < segment.missing_bytes:
                count = reply.read_into(view[fill : segment.missing_bytes])
                if count == 0:
                    break
                fill += count
                window_bytes += count
                now = time.monotonic()
                if fill == BUFFER_BYTES or now - flushed_at >= FLUSH_S:
                    self._store(view[:fill], segment, scope)
                    fill, flushed_at = 0, now
                if now - window_start >= options.stall_timeout_s:
                    if window_bytes < options.min_rate_bytes_per_s * (now - window_start):
                        raise _TooSlow(
                            f"{remote.what} arrives at less than {options.min_rate_bytes_per_s} bytes a second",
                            ref=remote.ref,
                            hint="check the network, then pull again",
                        )
                    window_start, window_bytes = now, 0
        finally:
            if fill:
                self._store(view[:fill], segment, scope)

    def _store(self, data: memoryview, segment: Segment, scope: CancelScope) -> None:
        if scope.cancelled:
            return
        offset = segment.position
        self._ingest.write(offset, data)
        with self._changed:
            self._ingest.note(offset, len(data))
            if self._segments is None:
                segment.position += len(data)
                self._received = self._front = segment.position
            else:
                self._segments.advance(segment, len(data))
                self._received, self._front = self._segments.received_bytes, self._segments.front
                self._ended = self._segments.complete
            self._most_received = max(self._most_received, self._received)
            self._unsynced += len(data)
            self._changed.notify_all()

    def _checkpoint(self, quit_workers: threading.Event) -> None:
        """Make what arrived durable every now and then, beside the flow of bytes."""
        last = time.monotonic()
        while not quit_workers.wait(0.5):
            late = time.monotonic() - last >= CHECKPOINT_S
            with self._changed:
                if self._unsynced < CHECKPOINT_BYTES and not (late and self._unsynced):
                    continue
                self._unsynced = 0
            try:
                self._ingest.checkpoint()
            except LmdError as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            last = time.monotonic()
