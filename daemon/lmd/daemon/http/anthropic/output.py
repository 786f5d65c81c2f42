"""Builds a message of Anthropic's API, and the events that tell of its making, from what inference yields."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from lmd.daemon.answer_events import Delta, Done, Started
from lmd.daemon.conversations import ToolCall
from lmd.daemon.http.answer_tally import ThinkingTally
from lmd.daemon.http.progress import EXTRA_KEY, done_extra

Object = dict[str, object]

_DELTAS = {"text": "text_delta", "thinking": "thinking_delta"}


class MessageBuilder:
    """A message in the making.

    Every method returns the events that belong to what it was told; the deltas of a stream add up to `message`, which
    is there once it is over.
    """

    def __init__(self, *, model: str, max_tokens: int, stop_sequences: Sequence[str], one_call: bool) -> None:
        self._max_tokens = max_tokens
        self._stop_sequences = stop_sequences
        self._one_call = one_call
        self._called = False
        self._content: list[Object] = []
        #: The kind of the block that grows, "" when none does, and its text so far.
        self._open = ""
        self._pieces: list[str] = []
        self._tally = ThinkingTally()
        self.message: Object = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {},
        }

    def begin(self, started: Started) -> list[Object]:
        """Return the events that come first; *started* says what the prompt took."""
        usage = {**_input_usage(started), "output_tokens": 0}
        message = {**self.message, "content": [], "usage": usage}
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def add(self, delta: Delta) -> list[Object]:
        """Add what the model thought, said and called."""
        self._tally.add(delta)
        events: list[Object] = []
        if delta.thinking:
            events += self._say("thinking", delta.thinking)
        if delta.text:
            events += self._say("text", delta.text)
        for call in delta.tool_calls:
            if self._called and self._one_call:
                break
            self._called = True
            events += self._call(call)
        return events

    def finish(self, done: Done) -> list[Object]:
        """End the message."""
        events: list[Object] = []
        if not self._open and not self._content:
            events += self._say("text", "")
        events += self._close()
        reason, stop = self._stop(done)
        usage = {
            **_input_usage(done),
            "output_tokens": done.generated_tokens,
            "output_tokens_details": {"thinking_tokens": self._tally.thinking_tokens},
        }
        extra = done_extra(done)
        self.message |= {"stop_reason": reason, "stop_sequence": stop, "usage": usage, EXTRA_KEY: extra}
        told: Object = {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": stop},
            "usage": usage,
            EXTRA_KEY: extra,
        }
        return [*events, told, {"type": "message_stop"}]

    def _stop(self, done: Done) -> tuple[str, str | None]:
        if done.finish_reason == "tool_calls":
            return "tool_use", None
        if done.finish_reason == "length":
            # Otherwise it was the context that came to its end.
            whole = done.generated_tokens >= self._max_tokens
            return "max_tokens" if whole else "model_context_window_exceeded", None
        if done.stop and done.stop in self._stop_sequences:
            return "stop_sequence", done.stop
        return "end_turn", None

    def _say(self, kind: str, text: str) -> list[Object]:
        events: list[Object] = []
        if self._open != kind:
            events += self._close()
            self._open = kind
            events.append(self._event("content_block_start", content_block=_block(kind, "")))
        if text:
            self._pieces.append(text)
            events.append(self._event("content_block_delta", delta={"type": _DELTAS[kind], kind: text}))
        return events

    def _close(self) -> list[Object]:
        if not self._open:
            return []
        event = self._event("content_block_stop")
        self._content.append(_block(self._open, "".join(self._pieces)))
        self._open, self._pieces = "", []
        return [event]

    def _call(self, call: ToolCall) -> list[Object]:
        events = self._close()
        block: Object = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        events += [
            self._event("content_block_start", content_block=block),
            self._event("content_block_delta", delta={"type": "input_json_delta", "partial_json": call.arguments}),
            self._event("content_block_stop"),
        ]
        self._content.append({**block, "input": json.loads(call.arguments)})
        return events

    def _event(self, kind: str, **fields: object) -> Object:
        """Return an event of the block that comes after those that are whole."""
        return {"type": kind, "index": len(self._content), **fields}


def _block(kind: str, text: str) -> Object:
    # Nothing is signed: thoughts that come back are taken as they are.
    return {"type": kind, kind: text, **({"signature": ""} if kind == "thinking" else {})}


def _input_usage(counts: Started | Done) -> Object:
    return {
        "input_tokens": counts.prompt_tokens - counts.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached_tokens,
    }
