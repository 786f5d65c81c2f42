"""Counts what adapters tell of an answer and the events do not say directly."""

from __future__ import annotations

from lmd.daemon.answer_events import Delta


class ThinkingTally:
    """Counts the tokens that an answer of one choice spent on thoughts.

    A delta says how many tokens there are by now. Where one has thoughts and more, which a slow consumer can get, its
    tokens are shared out by the lengths of the texts.
    """

    def __init__(self) -> None:
        self.thinking_tokens = 0
        self._seen_tokens = 0

    def add(self, delta: Delta) -> None:
        """Count a delta; in the order in which they come."""
        new_tokens = delta.generated_tokens - self._seen_tokens
        self._seen_tokens = delta.generated_tokens
        if not delta.thinking:
            return
        said = len(delta.text) + sum(len(call.arguments) + len(call.name) for call in delta.tool_calls)
        self.thinking_tokens += round(new_tokens * len(delta.thinking) / (len(delta.thinking) + said))
