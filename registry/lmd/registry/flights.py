"""One transfer per blob, however many pulls want it.

A flight is a transfer in its own thread, with everybody who waits for it. Who leaves does not disturb the others; the
last one leaving stops it, and what arrived stays for resume. Space on the disk is reserved when a flight is made, so
that a pull of many blobs is refused before its first byte, and a blob that many wait for is counted once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING

from lmd.registry.cancel import CancelScope
from lmd.registry.digest import Digest
from lmd.registry.errors import DigestMismatch, GgufInvalid, SourceError
from lmd.registry.http import Http
from lmd.registry.remote_file import RemoteFile
from lmd.registry.transfer import Transfer, TransferOptions

if TYPE_CHECKING:
    from lmd.registry.store import Ingest, Store

_log = logging.getLogger(__name__)


class FlightState(Enum):
    """What a flight is doing."""

    DOWNLOADING = "downloading"
    RETRYING = "retrying"
    COMMITTING = "committing"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class FlightProgress:
    """How far a flight is; *resumed_bytes* were there when it started."""

    state: FlightState
    received_bytes: int
    resumed_bytes: int
    detail: str = ""


class Flight:
    """A transfer and those who wait for it. Made and joined through `Flights`."""

    def __init__(self, store: Store, key: str, remote: RemoteFile, ingest: Ingest) -> None:
        self.key = key
        self.remote = remote
        self.waiters = 1
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        # Guards what follows; notified at each change.
        self.changed = threading.Condition()
        self.progress = FlightProgress(FlightState.DOWNLOADING, ingest.received_bytes, ingest.received_bytes)
        self.result: tuple[Digest, int] | None = None
        self.error: BaseException | None = None
        self._ingest = ingest
        missing = max(0, (remote.size_bytes or 0) - ingest.received_bytes)
        self._reservation = store.reserve(missing, remote.what) if missing else None

    @property
    def ended(self) -> bool:
        """Whether there is a result or an error."""
        return self.result is not None or self.error is not None

    def wake(self) -> None:
        """Let those who wait look around."""
        with self.changed:
            self.changed.notify_all()

    def fly(self, http: Http, options: TransferOptions) -> None:
        """Fetch and commit; sets result or error."""
        resumed = self.progress.resumed_bytes
        transfer = Transfer(
            http,
            self.remote,
            self._ingest,
            options,
            stop=self.stop,
            on_progress=self._report_progress,
            on_retry=self._report_retry,
        )
        try:
            digest, size_bytes = transfer.run()
            self._report(FlightState.COMMITTING, size_bytes)
            self._ingest.commit(digest, size_bytes)
            _log.info("%s: stored as %s (%d bytes, %d resumed)", self.remote.what, digest, size_bytes, resumed)
        except BaseException as error:
            if isinstance(error, (DigestMismatch, GgufInvalid)):
                self._ingest.discard()
            self._end(error=error)
        else:
            self._end(result=(digest, size_bytes))

    def abandon(self) -> None:
        """Give up a flight that never started."""
        self._close()

    def _report(self, state: FlightState, received_bytes: int, detail: str = "") -> None:
        with self.changed:
            if self._reservation is not None and received_bytes > self.progress.received_bytes:
                self._reservation.shrink(received_bytes - self.progress.received_bytes)
            self.progress = replace(self.progress, state=state, received_bytes=received_bytes, detail=detail)
            self.changed.notify_all()

    def _report_progress(self, received_bytes: int) -> None:
        # Nothing new is no reason to forget what is being waited for.
        if received_bytes != self.progress.received_bytes:
            self._report(FlightState.DOWNLOADING, received_bytes)

    def _report_retry(self, error: SourceError) -> None:
        self._report(FlightState.RETRYING, self.progress.received_bytes, error.message)

    def _end(self, result: tuple[Digest, int] | None = None, error: BaseException | None = None) -> None:
        self._close()
        with self.changed:
            self.result, self.error = result, error
            if result is not None:
                self.progress = replace(self.progress, state=FlightState.DONE, received_bytes=result[1], detail="")
            self.changed.notify_all()

    def _close(self) -> None:
        _let_go(self._ingest)
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None


class Ticket:
    """One pull's part in a flight; leave it at the end, or use it as a context manager."""

    def __init__(self, flights: Flights, flight: Flight, *, leads: bool) -> None:
        self._flights = flights
        self._flight = flight
        self._left = False
        #: Whether this pull's token is the one that is used.
        self.leads = leads

    def wait(self, cancel: CancelScope, on_progress: Callable[[FlightProgress], None]) -> tuple[Digest, int]:
        """Wait for the end of the flight, starting it when nobody has, and return digest and size.

        *on_progress* is called from this thread.

        Raises:
            Whatever ended the flight; PullCancelled when *cancel* is.
        """
        flight = self._flight
        self._flights.start(flight)
        cancel.call(flight.wake)
        seen: FlightProgress | None = None
        while True:
            with flight.changed:
                if flight.progress is seen and not flight.ended and not cancel.cancelled:
                    flight.changed.wait(1.0)
                progress, result, error = flight.progress, flight.result, flight.error
            cancel.check()
            if progress is not seen:
                seen = progress
                on_progress(progress)
            if error is not None:
                raise error
            if result is not None:
                return result

    def leave(self) -> None:
        """Stop taking part; the last one leaving stops the flight."""
        if not self._left:
            self._left = True
            self._flights.leave(self._flight)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


class Flights:
    """The flights of one store. Thread-safe."""

    def __init__(self, store: Store, http: Http, options: TransferOptions) -> None:
        self._store = store
        self._http = http
        self._options = options
        # Guards the table, the waiters' counts and the threads of its flights; notified when a flight leaves it.
        self._changed = threading.Condition()
        self._flights: dict[str, Flight] = {}

    def join(self, key: str, remote: RemoteFile, *, resumable: bool, cancel: CancelScope) -> Ticket | None:
        """Return a part in the flight of *key*, made if need be; None when the blob has arrived meanwhile.

        *resumable*: whether what an earlier transfer of *key* left is of the same file.

        Raises:
            DiskFull: there is no room for it.
            PullCancelled: cancelled while an earlier flight was winding down.
        """
        cancel.call(self._wake)
        with self._changed:
            while (flight := self._flights.get(key)) is not None:
                if not flight.stop.is_set() and not flight.ended:
                    flight.waiters += 1
                    return Ticket(self, flight, leads=flight.remote.credentials == remote.credentials)
                cancel.check()
                self._changed.wait(1.0)
            cancel.check()
            if remote.sha256 is not None and self._store.has_blob(remote.sha256, remote.size_bytes):
                return None
            ingest = self._store.begin_ingest(key, total_bytes=remote.size_bytes)
            try:
                if not resumable:
                    ingest.reset()
                flight = Flight(self._store, key, remote, ingest)
            except BaseException:
                _let_go(ingest)
                raise
            self._flights[key] = flight
            return Ticket(self, flight, leads=True)

    def start(self, flight: Flight) -> None:
        """Start a flight's thread unless it runs."""
        with self._changed:
            if flight.thread is None:
                flight.thread = threading.Thread(target=self._run, args=(flight,), name="lmd-flight")
                flight.thread.start()

    def leave(self, flight: Flight) -> None:
        """Count one waiter less; stop the flight when it was the last."""
        with self._changed:
            flight.waiters -= 1
            if flight.waiters:
                return
            flight.stop.set()
            if flight.thread is None:
                flight.abandon()
                self._remove(flight)

    def close(self, timeout_s: float) -> None:
        """Stop every flight and wait until they have closed their ingests."""
        with self._changed:
            flights = list(self._flights.values())
            for flight in flights:
                flight.stop.set()
        for flight in flights:
            if flight.thread is not None:
                flight.thread.join(timeout_s)

    def _run(self, flight: Flight) -> None:
        try:
            flight.fly(self._http, self._options)
        finally:
            with self._changed:
                self._remove(flight)

    def _remove(self, flight: Flight) -> None:
        with contextlib.suppress(KeyError):
            del self._flights[flight.key]
        self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _let_go(ingest: Ingest) -> None:
    """Keep what arrived for resume; an ingest without a byte would only be garbage."""
    if ingest.received_bytes:
        ingest.close()
    else:
        ingest.discard()
