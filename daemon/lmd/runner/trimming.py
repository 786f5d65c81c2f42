"""Which turns of a chat are dropped when the context is too short: the oldest, and as few as possible.

The system prompt and the last turn always stay, and what is left begins with a user's turn, as templates expect. How
many tokens a shortened chat has is known only once its template has rendered it, so the place to cut is found by
bisection: about log2 of the number of turns are rendered.
"""

from __future__ import annotations

from array import array

from lmd.runner.v1 import frames_pb2

#: The share of the context that stays free for an answer without a limit of its own.
_ANSWER_SHARE = 4


def room_for_prompt(num_ctx: int, num_predict: int) -> int:
    """Return how many tokens a prompt may have when parts of it are dropped to make room.

    The answer keeps what it may need: its limit, but no more than half of the context, or a quarter without a limit.
    """
    answer = num_ctx // _ANSWER_SHARE if num_predict < 0 else min(num_predict, num_ctx // 2)
    return max(1, num_ctx - max(1, answer))


class Trim:
    """The search for the fewest turns to drop.

    Ask `next_chat` for what to try, `note` how that went, until there is nothing more to try.

    Attributes:
        best: the tokens of the longest chat that fits so far, and how many messages it lacks.
        shortest: tokens of the shortest chat, when not even that fits; 0 otherwise.
    """

    def __init__(self, chat: frames_pb2.Chat) -> None:
        """Begin with a chat that does not fit as a whole."""
        self._chat = chat
        self.best: tuple[array[int], int] | None = None
        self.shortest = 0
        self._messages = list(chat.messages)
        self._first = next((i for i, m in enumerate(self._messages) if m.role != "system"), len(self._messages))
        last = len(self._messages) - 1
        # Where the kept turns may begin; later cuts leave fewer tokens.
        cuts = [i for i in range(self._first + 1, last) if self._messages[i].role == "user"]
        # A result is nothing without the call it is for.
        self._cuts = [*cuts, last] if last > self._first and self._messages[last].role != "tool" else cuts
        self._low, self._high = 0, len(self._cuts) - 1
        self._tried = 0

    def next_chat(self) -> frames_pb2.Chat | None:
        """Return the chat to try next, None when the search is over."""
        if self._low > self._high or self.shortest:
            return None
        # First the shortest: if that does not fit, nothing does.
        self._tried = self._high if self.best is None else (self._low + self._high) // 2
        shorter = frames_pb2.Chat()
        shorter.CopyFrom(self._chat)
        del shorter.messages[self._first : self._cuts[self._tried]]
        return shorter

    def note(self, tokens: array[int] | None, excess: int = 0) -> None:
        """Take the tokens of the chat that was tried, None when it does not fit and has *excess* tokens."""
        if tokens is None:
            if self.best is None:
                self.shortest = excess
            self._low = self._tried + 1
        else:
            self.best = tokens, self._cuts[self._tried] - self._first
            self._high = self._tried - 1
