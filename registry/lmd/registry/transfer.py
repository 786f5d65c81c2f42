"""Fetching one file: several ranges at once, hashed on the way, resumed where an earlier try ended.

Workers receive into their own buffers; the calling thread hashes along the contiguous front (see `arrivals`).
Receiving, writing and hashing all release the GIL, so they run beside each other.

One connection starts. When it is slower than what one stream can hash, which is to say on nearly every network, the
rest of the file is cut into segments and others join. Over loopback or a very fast network more connections would
only compete for the processor.

Only bytes that the ingest has noted count: a resumed transfer asks for the rest and hashes what is there again.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmd.registry.addresses import without_secrets
from lmd.registry.arrivals import Arrivals, Inlet, new_buffer
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
from lmd.registry.segments import Segment, Segments, step_bytes_for
from lmd.registry.sources.refusals import blamed_on

if TYPE_CHECKING:
    from lmd.registry.store import Ingest

_log = logging.getLogger(__name__)

#: What has arrived is written and noted at least this often, so that little is lost when the process dies.
FLUSH_S = 0.25
#: The same when nothing has come for this long.
LULL_S = 0.02
PROGRESS_S = 0.2
#: After this much, or this long, what arrived is made durable against a power cut.
CHECKPOINT_BYTES = 256 << 20
CHECKPOINT_S = 30.0


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How hard to try.

    connections: ranges fetched at once, at most.
    join_after_s, join_below_bytes_per_s: others join the first connection when it is slower than this after that time.
    step_bytes: how much each asks for at once then; None picks it by the size of the file.
    stall_timeout_s: silence of a connection before it is dropped; also the window of the minimum rate.
    min_rate_bytes_per_s: a connection slower than this for a whole window counts as stalled.
    max_bytes: the largest file that is accepted.
    """

    connections: int = 4
    join_after_s: float = 0.25
    join_below_bytes_per_s: float = 200e6
    step_bytes: int | None = None
    stall_timeout_s: float = 30.0
    min_rate_bytes_per_s: int = 512
    max_bytes: int = 4 << 40
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
        # Lives as long as the transfer: without ranges each try is an attempt of its own.
        self._whole_budget = RetryBudget(options.retry)
        self._arrivals = Arrivals(ingest, None)
        self._most_before = 0
        #: Where redirects led; None asks the source again.
        self._location: str | None = None
        self._workers: list[threading.Thread] = []
        #: Whether one worker is at it and may call others. Used by that worker only.
        self._alone = False

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
            except (DigestMismatch, GgufInvalid):
                self._ingest.reset()
                if not resumed:
                    raise
                # Perhaps not the source is to blame but what was kept from an earlier try.
                _log.warning("%s: what was resumed is damaged", without_secrets(self._remote.url))
                resumed = False

    # The calling thread.

    def _attempt(self) -> tuple[Digest, int]:
        size = self._remote.size_bytes
        segments = None
        if self._ranges_work and size is not None:
            segments = Segments(size, self._ingest.received())
        else:
            self._ingest.reset()
        self._most_before = self._most_received
        self._arrivals = Arrivals(self._ingest, segments)
        target = self._fetch_whole if segments is None else self._fetch_ranges
        quit_workers = threading.Event()
        with CancelScope(quit_workers) as scope, CancelScope(self._stop) as outer:
            outer.call(quit_workers.set)
            outer.call(self._arrivals.wake)
            checkpoints = threading.Thread(target=self._checkpoint, args=(quit_workers,), name="lmd-checkpoint")
            checkpoints.start()
            try:
                if segments is None or not segments.complete:
                    self._alone = segments is not None and self._options.connections > 1
                    self._start_worker(target, scope)
                result = self._hash()
                # Let them give their connections back before the scope closes what it still holds.
                self._join_workers()
                return result
            finally:
                quit_workers.set()
                self._join_workers()
                checkpoints.join()

    def _hash(self) -> tuple[Digest, int]:
        remote, arrivals = self._remote, self._arrivals
        sha256 = hashlib.sha256()
        sha1 = hashlib.sha1(b"blob %d\0" % (remote.size_bytes or 0), usedforsecurity=False) if remote.git_sha1 else None
        scratch = new_buffer()
        hashed = 0
        reported_at = 0.0
        while not arrivals.all_hashed(hashed):
            # One buffer per round, so that cancel, errors and progress are never far.
            data, lent = arrivals.next(hashed, scratch, PROGRESS_S)
            if self._stop.is_set():
                raise PullCancelled
            if data:
                if hashed == 0 and len(data) >= len(remote.magic):
                    remote.check_start(bytes(data[:16]))
                sha256.update(data)
                if sha1 is not None:
                    sha1.update(data)
                hashed += len(data)
            if lent is not None:
                arrivals.give_back(lent)
            now = time.monotonic()
            if now - reported_at >= PROGRESS_S:
                reported_at = now
                self._on_progress(arrivals.received_bytes)
        if hashed < len(remote.magic):
            raise GgufInvalid(f"the file has only {hashed} bytes")
        self._on_progress(hashed)
        return remote.check_digests(sha256.hexdigest(), sha1.hexdigest() if sha1 else None), hashed

    def _join_workers(self) -> None:
        # A worker may start others until it ends.
        while self._workers:
            self._workers.pop(0).join()

    @property
    def _most_received(self) -> int:
        """The most bytes that any attempt had: only what is new counts as progress."""
        return max(self._most_before, self._arrivals.received_bytes)

    # The workers.

    def _start_worker(self, target: Callable[[CancelScope], None], scope: CancelScope) -> None:
        worker = threading.Thread(target=self._guarded, args=(target, scope), name="lmd-fetch")
        self._workers.append(worker)
        worker.start()

    def _guarded(self, target: Callable[[CancelScope], None], scope: CancelScope) -> None:
        """Run a worker; what ends it ends the transfer."""
        try:
            target(scope)
        except BaseException as error:
            # Sockets closed by the scope break in many ways, none of which is news.
            self._arrivals.fail(PullCancelled() if scope.cancelled else error)

    def _fetch_ranges(self, scope: CancelScope) -> None:
        inlet = Inlet(self._arrivals)
        budget = RetryBudget(self._options.retry)
        while (segment := self._arrivals.take()) is not None:
            while segment.missing_bytes:
                before = self._most_received
                try:
                    with blamed_on(self._remote.ref), self._request(scope, segment) as reply:
                        self._receive(reply, inlet, segment, scope)
                except SourceError as error:
                    self._back_off(error, budget, scope, before)

    def _let_others_join(self, scope: CancelScope) -> None:
        """Divide the rest of the file and start the other workers."""
        self._alone = False
        waiting = self._arrivals.cut(self._options.step_bytes or step_bytes_for(self._remote.size_bytes or 0))
        for _ in range(min(self._options.connections - 1, waiting)):
            self._start_worker(self._fetch_ranges, scope)

    def _fetch_whole(self, scope: CancelScope) -> None:
        """Receive a file of unknown size, or from a source without ranges, in one stream."""
        remote = self._remote
        whole = Segment(0, self._options.max_bytes if remote.size_bytes is None else remote.size_bytes, 0)
        before = self._most_received
        try:
            with blamed_on(remote.ref), self._request(scope, None) as reply:
                self._receive(reply, Inlet(self._arrivals), whole, scope)
                one_more = memoryview(bytearray(1))
                if reply.remaining_bytes != 0 and not whole.missing_bytes and reply.read_into(one_more):
                    raise SourceInvalid(f"{remote.what} is longer than announced", ref=remote.ref)
                if remote.size_bytes is not None and whole.missing_bytes:
                    raise SourceUnavailable(f"{remote.what} ended early", ref=remote.ref, hint="pull again")
        except SourceError as error:
            self._back_off(error, self._whole_budget, scope, before)
            # The next try sends everything again, and the hasher must start over with it.
            raise _Restart from error
        self._arrivals.finish()

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

    def _receive(self, reply: Reply, inlet: Inlet, segment: Segment, scope: CancelScope) -> None:
        """Move a reply's body into the ingest until the segment is full or the body ends.

        Raises:
            TransportFailed, SourceUnavailable: the connection broke, stalled or is too slow; what it brought is noted.
        """
        options, remote = self._options, self._remote
        window_start = flushed_at = now = time.monotonic()
        window_bytes = 0
        try:
            while room := inlet.room(segment):
                if self._alone and now - window_start >= options.join_after_s:
                    if window_bytes <= options.join_below_bytes_per_s * (now - window_start):
                        inlet.flush(segment)
                        self._let_others_join(scope)
                        continue
                if not inlet.is_empty and not reply.ready(LULL_S):
                    inlet.flush(segment)
                    continue
                count = reply.read_into(room)
                if count == 0:
                    break
                inlet.filled(count)
                window_bytes += count
                now = time.monotonic()
                if inlet.is_full or now - flushed_at >= FLUSH_S:
                    inlet.flush(segment)
                    flushed_at = now
                if now - window_start >= options.stall_timeout_s:
                    if window_bytes < options.min_rate_bytes_per_s * (now - window_start):
                        raise _TooSlow(
                            f"{remote.what} arrives at less than {options.min_rate_bytes_per_s} bytes a second",
                            ref=remote.ref,
                            hint="check the network, then try again",
                        )
                    window_start, window_bytes = now, 0
        finally:
            # After a cancel, what a socket closed under TLS returned last is not to be trusted.
            if scope.cancelled:
                inlet.drop()
            inlet.flush(segment)

    def _checkpoint(self, quit_workers: threading.Event) -> None:
        """Make what arrived durable every now and then, beside the flow of bytes."""
        last = time.monotonic()
        while not quit_workers.wait(0.5):
            late = time.monotonic() - last >= CHECKPOINT_S
            if not self._arrivals.unsynced(1 if late else CHECKPOINT_BYTES):
                continue
            try:
                self._ingest.checkpoint()
            except LmdError as error:
                self._arrivals.fail(error)
                return
            last = time.monotonic()
