"""Builds a response of `/v1/responses`, and the events that tell of its making, from what inference yields."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping

from lmd.daemon.answer_events import Delta, Done, TokenLogprob
from lmd.daemon.conversations import ToolCall
from lmd.daemon.http.answer_tally import ThinkingTally
from lmd.daemon.http.openai.responses_requests import TOOL_CHOICES, ResponseRequest
from lmd.daemon.http.progress import EXTRA_KEY, done_extra

Object = dict[str, object]


class ResponseBuilder:
    """A response in the making.

    Every method returns the events that belong to what it was told, numbered; the deltas of a stream add up to the
    items that its last event holds. Who does not stream leaves the events and takes `response` in the end.
    """

    def __init__(self, request: ResponseRequest, *, now_s: int) -> None:
        self._head = _head(request, now_s)
        self._one_call = request.parallel_tool_calls is False
        self._logprobs: list[Object] = []
        self._output: list[Object] = []
        self._open: _Item | None = None
        self._called = False
        self._tally = ThinkingTally()
        self._sequence_number = 0
        #: The response as it is now; what it has put out is there once it is over.
        self.response: Object = {**self._head, "status": "in_progress", "output": []}

    def begin(self) -> list[Object]:
        """Return the events that come first."""
        response = self.response
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def add(self, delta: Delta) -> list[Object]:
        """Add what the model thought, said and called."""
        self._tally.add(delta)
        events: list[Object] = []
        if delta.text or not delta.thinking:
            self._logprobs += [_logprob(token) for token in delta.logprobs]
        if delta.thinking:
            events += self._say(_Reasoning, delta.thinking, [])
        if delta.text:
            # The text can lag behind its log probabilities, and those of thoughts belong to nobody.
            logprobs, self._logprobs = self._logprobs, []
            events += self._say(_Message, delta.text, logprobs)
        for call in delta.tool_calls:
            if self._called and self._one_call:
                break
            self._called = True
            events += self._call(call)
        return events

    def finish(self, done: Done, *, now_s: int) -> list[Object]:
        """End the response."""
        events: list[Object] = []
        cut = done.finish_reason == "length"
        if self._open is None and not self._output:
            events += self._say(_Message, "", [])
        events += self._close("incomplete" if cut else "completed")
        self.response = {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else now_s,
            "output": self._output,
            "usage": {
                "input_tokens": done.prompt_tokens,
                "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": done.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": self._tally.thinking_tokens},
                "total_tokens": done.prompt_tokens + done.generated_tokens,
            },
            EXTRA_KEY: done_extra(done),
        }
        events.append(self._event("response.incomplete" if cut else "response.completed", response=self.response))
        return events

    def fail(self, code: str, message: str) -> list[Object]:
        """End the response with a failure; what was put out before it stays."""
        events = self._close("incomplete")
        self.response = {
            **self._head,
            "status": "failed",
            "error": {"code": code, "message": message},
            "output": self._output,
        }
        events.append(self._event("response.failed", response=self.response))
        return events

    def _event(self, kind: str, /, **fields: object) -> Object:
        event: Object = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return event

    def _say(self, kind: type[_Item], text: str, logprobs: list[Object]) -> list[Object]:
        events: list[Object] = []
        if not isinstance(self._open, kind):
            events += self._close("completed")
            self._open = kind(len(self._output))
            events += [self._event(name, **fields) for name, fields in self._open.opening()]
        if text:
            name, fields = self._open.add(text, logprobs)
            events.append(self._event(name, **fields))
        return events

    def _close(self, status: str) -> list[Object]:
        if self._open is None:
            return []
        item, self._open = self._open, None
        events = [self._event(name, **fields) for name, fields in item.closing(status)]
        self._output.append(item.whole(status))
        return events

    def _call(self, call: ToolCall) -> list[Object]:
        events = self._close("completed")
        item: Object = {
            "type": "function_call",
            "id": f"fc_{secrets.token_hex(16)}",
            "call_id": call.id,
            "name": call.name,
        }
        where: Object = {"item_id": item["id"], "output_index": len(self._output)}
        whole = {**item, "arguments": call.arguments, "status": "completed"}
        events += [
            self._event(
                "response.output_item.added",
                output_index=len(self._output),
                item={**item, "arguments": "", "status": "in_progress"},
            ),
            self._event("response.function_call_arguments.delta", **where, delta=call.arguments),
            self._event("response.function_call_arguments.done", **where, arguments=call.arguments, name=call.name),
            self._event("response.output_item.done", output_index=len(self._output), item=whole),
        ]
        self._output.append(whole)
        return events


Named = tuple[str, Object]


class _Item(ABC):
    """A part of the output that grows by text: what its events are called, and what it looks like."""

    prefix = ""

    def __init__(self, index: int) -> None:
        self.id = f"{self.prefix}_{secrets.token_hex(16)}"
        self._index = index
        self._where: Object = {"item_id": self.id, "output_index": index}
        self._pieces: list[str] = []

    @abstractmethod
    def opening(self) -> list[Named]:
        """Return the events before the first text."""

    @abstractmethod
    def add(self, text: str, logprobs: list[Object]) -> Named:
        """Return the event of more text."""

    @abstractmethod
    def closing(self, status: str) -> list[Named]:
        """Return the events after the last text."""

    @abstractmethod
    def whole(self, status: str) -> Object:
        """Return the item."""


class _Message(_Item):
    prefix = "msg"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._where["content_index"] = 0
        self._logprobs: list[Object] = []

    def opening(self) -> list[Named]:
        return [
            ("response.output_item.added", {"output_index": self._index, "item": self._item("in_progress", [])}),
            ("response.content_part.added", {**self._where, "part": self._part()}),
        ]

    def add(self, text: str, logprobs: list[Object]) -> Named:
        self._pieces.append(text)
        self._logprobs += logprobs
        return "response.output_text.delta", {**self._where, "delta": text, "logprobs": logprobs}

    def closing(self, status: str) -> list[Named]:
        part = self._part()
        return [
            ("response.output_text.done", {**self._where, "text": part["text"], "logprobs": self._logprobs}),
            ("response.content_part.done", {**self._where, "part": part}),
            ("response.output_item.done", {"output_index": self._index, "item": self._item(status, [part])}),
        ]

    def whole(self, status: str) -> Object:
        return self._item(status, [self._part()])

    def _part(self) -> Object:
        return {
            "type": "output_text",
            "text": "".join(self._pieces),
            "annotations": [],
            "logprobs": list(self._logprobs),
        }

    def _item(self, status: str, content: list[Object]) -> Object:
        return {"type": "message", "id": self.id, "status": status, "role": "assistant", "content": content}


class _Reasoning(_Item):
    prefix = "rs"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._where["summary_index"] = 0

    def opening(self) -> list[Named]:
        return [
            ("response.output_item.added", {"output_index": self._index, "item": self._item("in_progress", [])}),
            ("response.reasoning_summary_part.added", {**self._where, "part": self._part()}),
        ]

    def add(self, text: str, logprobs: list[Object]) -> Named:
        self._pieces.append(text)
        return "response.reasoning_summary_text.delta", {**self._where, "delta": text}

    def closing(self, status: str) -> list[Named]:
        part = self._part()
        return [
            ("response.reasoning_summary_text.done", {**self._where, "text": part["text"]}),
            ("response.reasoning_summary_part.done", {**self._where, "part": part}),
            ("response.output_item.done", {"output_index": self._index, "item": self._item(status, [part])}),
        ]

    def whole(self, status: str) -> Object:
        return self._item(status, [self._part()])

    def _part(self) -> Object:
        return {"type": "summary_text", "text": "".join(self._pieces)}

    def _item(self, status: str, summary: list[Object]) -> Object:
        return {"type": "reasoning", "id": self.id, "status": status, "summary": summary, "encrypted_content": None}


def _head(request: ResponseRequest, now_s: int) -> Object:
    """Return the fields that a response has from its beginning: most of them repeat the request."""
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": now_s,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "model": request.model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "background": False,
        "reasoning": {
            "effort": request.reasoning.effort if request.reasoning else None,
            "summary": request.reasoning.summary if request.reasoning else None,
        },
        "service_tier": "default",
        "store": False,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_logprobs": request.top_logprobs or 0,
        "text": _text(request),
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "tool_choice": _choice(request),
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }


def _choice(request: ResponseRequest) -> str | Object:
    choice = request.tool_choice
    if choice is None:
        return "auto"
    return choice.type if choice.type in TOOL_CHOICES else choice.model_dump(exclude_none=True)


def _text(request: ResponseRequest) -> Mapping[str, object]:
    asked = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
    return {"format": {"type": "text"}, **asked}


def _logprob(token: TokenLogprob) -> Object:
    return {
        "token": token.token.decode(errors="replace"),
        "bytes": list(token.token),
        "logprob": token.logprob,
        "top_logprobs": [
            {"token": other.token.decode(errors="replace"), "bytes": list(other.token), "logprob": other.logprob}
            for other in token.top
        ],
    }
