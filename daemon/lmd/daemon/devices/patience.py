"""Reads drivers without waiting for one that hangs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import structlog

from lmd.daemon.devices.values import Card, CardReader

log = structlog.get_logger(__name__)

#: Drivers answer within milliseconds. One that takes longer hangs, and so would whoever plans a load.
ANSWER_S = 2.0


class PatientCards:
    """The cards of *reader*; while that does not answer, those it told last, with that fault.

    Each reading has a thread of its own, which ends with the process however long the driver hangs. There is one at a
    time: as long as it hangs, nobody waits for it again.
    """

    def __init__(self, reader: CardReader, *, answer_s: float = ANSWER_S) -> None:
        self._reader = reader
        self._answer_s = answer_s
        #: Protects what follows.
        self._lock = threading.Lock()
        self._reading: Future[Sequence[Card]] | None = None
        self._hangs = False
        self._last: Sequence[Card] = ()

    def cards(self) -> Sequence[Card]:
        """Return the cards now. Blocks for `answer_s` at most; thread-safe."""
        with self._lock:
            if self._reading is None:
                self._reading = Future()
                threading.Thread(target=self._read, args=(self._reading,), daemon=True, name="driver").start()
            reading, patience_s = self._reading, 0.0 if self._hangs else self._answer_s
        try:
            return reading.result(timeout=patience_s)
        except TimeoutError:
            with self._lock:
                if not self._hangs:
                    log.warning("driver_hangs", cards=[card.description for card in self._last])
                self._hangs = self._reading is reading
                return [replace(card, free_bytes=0, fault="its driver does not answer") for card in self._last]

    def look_again(self) -> None:
        """Hand it on."""
        self._reader.look_again()

    def _read(self, reading: Future[Sequence[Card]]) -> None:
        try:
            found = self._reader.cards()
        except BaseException as error:  # it belongs to whoever waits for the answer
            with self._lock:
                self._reading, self._hangs = None, False
            reading.set_exception(error)
            return
        with self._lock:
            self._reading, self._hangs, self._last = None, False, found
        reading.set_result(found)
