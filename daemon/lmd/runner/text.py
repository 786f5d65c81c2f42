"""From token pieces to the text a user sees: whole characters, nothing after a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from lmd.runner.patterns import Patterns, Scan


class StopMatcher:
    """Finds stop texts in a stream of text, wherever its pieces are cut.

    The stop text that is complete first wins, and of those complete at the same character the longest. What comes out
    is therefore the same for every way of cutting the stream. Text that may become a stop text is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = Patterns(stops)
        self._scan = Scan(self._patterns)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Return the text that is safe to show and the stop text that ended it (empty while none did).

        After a stop text has been returned the matcher must not be fed again.
        """
        if self._patterns.root is None:
            return text, ""
        scan = self._scan
        begin = scan.position - len(self._held)
        found = scan.feed(text)
        text = self._held + text
        if found is not None:
            start, end = found
            self._held = ""
            return text[: start - begin], text[start - begin : end - begin]
        if not scan.live:
            self._held = ""
            return text, ""
        cut = scan.live[0][0] - begin
        self._held = text[cut:]
        return text[:cut], ""

    def flush(self) -> str:
        """Return what was held back: the stream has ended and it became no stop text."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Turns the bytes of token after token into text.

    Bytes of a character that is not complete yet are kept; bytes that can never be a character become U+FFFD, since
    nothing keeps a model from saying them.
    """

    #: Whether a function was called: text calls none.
    called = False

    def __init__(self, stops: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stops)
        self.stop = ""

    def feed(self, piece: bytes) -> str:
        """Return the text that is certain now; `stop` is set once a stop text was met."""
        text = self._decoder.decode(piece)
        if not text:
            return ""
        text, self.stop = self._matcher.feed(text)
        return text

    def finish(self, *, cut: bool) -> str:
        """Return what was held back at the end.

        With *cut*, the stream ended for lack of room and a character it was in the middle of is dropped; otherwise the
        model chose to end there and the incomplete character is as invalid as any other (U+FFFD).
        """
        if self.stop:
            return ""
        tail = "" if cut else self._decoder.decode(b"", final=True)
        text, self.stop = self._matcher.feed(tail)
        return text if self.stop else text + self._matcher.flush()
