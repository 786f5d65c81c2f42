"""Modelfiles in the manner of the families people run, in both template languages, and what their prompts must be.

The prompts in `tests/data/modelfiles` were made by Go's own text/template, with the values that Ollama gives it; the
Jinja of each family has to arrive at the same.
"""

from __future__ import annotations

import json
from pathlib import Path

from lmd.runner.v1 import frames_pb2

FOLDER = Path(__file__).parent.parent / "data" / "modelfiles"
LANGUAGES = ("go", "jinja")

_WEATHER = frames_pb2.Tool(
    name="weather",
    description="The weather in a city",
    parameters=json.dumps(
        {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": "integer", "description": "How many"},
            },
        }
    ),
)


def _turn(role: str, content: str = "", **fields: object) -> frames_pb2.ChatMessage:
    return frames_pb2.ChatMessage(role=role, content=content, **fields)  # type: ignore[arg-type]


_TURNS = [_turn("system", "Be brief."), _turn("user", "Hi <b>"), _turn("assistant", "Hello!"), _turn("user", "Bye…")]
_CALL = frames_pb2.ToolCall(name="weather", arguments='{"city":"Rome","days":2}')

CHATS = {
    "first": frames_pb2.Chat(messages=[_turn("user", "Hi <b>")]),
    "turns": frames_pb2.Chat(messages=_TURNS),
    "prefill": frames_pb2.Chat(messages=[*_TURNS[:2], _turn("assistant", "Well,")]),
    "functions": frames_pb2.Chat(messages=_TURNS, tools=[_WEATHER]),
    "result": frames_pb2.Chat(
        messages=[
            _turn("user", "Weather in Rome?"),
            _turn("assistant", tool_calls=[_CALL, _CALL]),
            _turn("tool", '{"sky":"blue"}', tool_name="weather"),
        ],
        tools=[_WEATHER],
    ),
    "think": frames_pb2.Chat(messages=_TURNS, think=frames_pb2.THINK_ON),
    "no_think": frames_pb2.Chat(messages=_TURNS, think=frames_pb2.THINK_OFF),
    "thought": frames_pb2.Chat(
        messages=[*_TURNS[:2], _turn("assistant", "Hello!", thinking="A greeting.")], think=frames_pb2.THINK_HIGH
    ),
}
"""Chats by what is special about them."""

_PLAIN = ("first", "turns")
_CHATS = {
    "llama31": (*_PLAIN, "prefill", "functions", "result"),
    "mistral": (*_PLAIN, "functions", "result"),
    "qwen25": (*_PLAIN, "prefill", "functions", "result"),
    "qwen3": (*_PLAIN, "think", "no_think", "thought"),
    "gemma": (*_PLAIN, "prefill"),
}
FAMILIES = ("alpaca", "chatml", "gemma", "llama3", "llama31", "mistral", "phi3", "qwen25", "qwen3", "zephyr")
CASES = [(family, chat) for family in FAMILIES for chat in _CHATS.get(family, _PLAIN)]
"""What there is a prompt for."""


def modelfile(family: str, language: str) -> str:
    """Return the Modelfile of a family."""
    return (FOLDER / f"{family}.{language}.modelfile").read_text()


def prompt(family: str, chat: str) -> str:
    """Return the prompt that a family makes of a chat, in either language."""
    return (FOLDER / f"{family}.{chat}.prompt").read_bytes().decode()
