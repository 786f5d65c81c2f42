"""Streams of answers as Hypothesis makes them up: what a model may think, say and call, in any order and any pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass

from hypothesis import strategies as st

from lmd.daemon.answer_events import Delta, Done
from lmd.daemon.conversations import ToolCall

texts = st.text(max_size=8)
calls = st.builds(
    ToolCall,
    id=st.uuids().map(lambda made: f"call_{made.hex}"),
    name=st.sampled_from(["get_weather", "add"]),
    arguments=st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3).map(json.dumps),
)


@dataclass(frozen=True)
class AnswerStream:
    """The events of one answer."""

    deltas: tuple[Delta, ...]
    done: Done

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def thinking(self) -> str:
        return "".join(delta.thinking for delta in self.deltas)

    @property
    def calls(self) -> list[ToolCall]:
        return [call for delta in self.deltas for call in delta.tool_calls]


def done(**fields: object) -> Done:
    """Return the end of an answer, with *fields* instead of what is usual."""
    usual: dict[str, object] = {
        "finish_reason": "stop",
        "prompt_tokens": 9,
        "cached_tokens": 4,
        "generated_tokens": 7,
        "total_ns": 5,
        "load_ns": 0,
        "queue_ns": 1,
        "prompt_ns": 2,
        "generate_ns": 2,
        "seed": 1,
        "stop": "",
    }
    return Done(**usual | fields)  # type: ignore[arg-type]


@st.composite
def answer_streams(draw: st.DrawFn) -> AnswerStream:
    """Make up an answer."""
    generated = 0
    deltas: list[Delta] = []
    for _ in range(draw(st.integers(0, 6))):
        generated += draw(st.integers(0, 5))
        delta = Delta(
            draw(texts),
            generated,
            thinking=draw(texts),
            tool_calls=tuple(draw(st.lists(calls, max_size=2))),
        )
        deltas.append(delta)
    reason = "tool_calls" if any(delta.tool_calls for delta in deltas) else draw(st.sampled_from(["stop", "length"]))
    end = done(
        finish_reason=reason,
        prompt_tokens=draw(st.integers(5, 50)),
        cached_tokens=draw(st.integers(0, 5)),
        generated_tokens=generated + draw(st.integers(0, 3)),
    )
    return AnswerStream(tuple(deltas), end)
