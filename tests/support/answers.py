"""Answers of models in every style: how they are written, and how they are read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

from lmd.runner.answer_parser import AnswerParser, Call, Part
from lmd.runner.answer_style import AnswerStyle, Calls, Form, Thoughts
from lmd.runner.v1.frames_pb2 import Tool

THINK = Thoughts("<think>", "</think>")
STYLES = {
    "hermes": AnswerStyle(THINK, Calls("<tool_call>", "</tool_call>", bare=True, pad="\n", gap="\n")),
    "tagged": AnswerStyle(THINK, Calls("<tool_call>", "</tool_call>", Form.TAGGED, pad="\n", gap="\n")),
    "llama3": AnswerStyle(
        None, Calls("<|python_tag|>", "", bare=True, unmarked=True, gap="; ", arguments_key="parameters")
    ),
    "mistral": AnswerStyle(Thoughts("[THINK]", "[/THINK]"), Calls("[TOOL_CALLS]", "", listed=True)),
    "mistral named": AnswerStyle(None, Calls("[TOOL_CALLS]", "", Form.NAMED)),
    "list": AnswerStyle(THINK, Calls("<TOOLCALL>", "</TOOLCALL>", listed=True)),
    "cohere": AnswerStyle(
        Thoughts("<|START_THINKING|>", "<|END_THINKING|>"),
        Calls(
            "<|START_ACTION|>",
            "<|END_ACTION|>",
            listed=True,
            name_key="tool_name",
            arguments_key="parameters",
            lead='"tool_call_id": "0", ',
        ),
    ),
    "generic": AnswerStyle(THINK, Calls("", "", bare=True, unmarked=True, gap="\n")),
    "channels": AnswerStyle(
        Thoughts("<|channel|>analysis<|message|>", "<|end|>"),
        Calls(" to=functions.", "", Form.CHANNEL),
        final="<|channel|>final<|message|>",
    ),
}
"""The styles that real templates lead to."""

TOOLS = (
    Tool(name="f", parameters='{"type": "object", "properties": {"s": {"type": "string"}}}'),
    Tool(name="get_weather"),
    Tool(name="get", parameters="{}"),
)


def read(
    style: AnswerStyle,
    pieces: Iterable[str],
    *,
    tools: Sequence[Tool] = TOOLS,
    opened: bool = False,
    thinking: bool = True,
    calls: bool = True,
    cut: bool = False,
) -> list[Part]:
    """Return the parts of an answer that comes in pieces, neighbours of the same kind joined."""
    parser = AnswerParser(style, tools, opened_thinking=opened, parses_thinking=thinking, parses_calls=calls)
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish(cut=cut)
    assert parser.called == any(part.call is not None for part in parts)
    joined: list[Part] = []
    for part in parts:
        assert [bool(part.thinking), bool(part.text), part.call is not None].count(True) == 1, part
        last = joined[-1] if joined else None
        if last is not None and last.text and part.text:
            joined[-1] = Part(text=last.text + part.text)
        elif last is not None and last.thinking and part.thinking:
            joined[-1] = Part(thinking=last.thinking + part.thinking)
        else:
            joined.append(part)
    return joined


def calls_in(parts: Iterable[Part]) -> list[Call]:
    return [part.call for part in parts if part.call is not None]


def text_in(parts: Iterable[Part]) -> str:
    return "".join(part.text for part in parts)


def cut_up(text: str, places: Iterable[int]) -> list[str]:
    """Return the pieces of a text that is cut at these places, modulo its length."""
    cuts = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[begin:end] for begin, end in itertools.pairwise(cuts)]


def write_calls(style: AnswerStyle, calls: Sequence[tuple[str, dict[str, object]]]) -> str:
    """Return what a model with this style says to make calls."""
    how = style.calls
    assert how is not None, "it can call"
    written = [_write_call(how, name, arguments) for name, arguments in calls]
    if how.form is Form.CHANNEL:
        return "<|call|><|start|>assistant".join(written)
    if how.listed:
        return f"{how.opener}[{', '.join(written)}]{how.closer}"
    opener = "" if how.unmarked else how.opener
    return how.gap.join(f"{opener}{how.pad}{call}{how.pad}{how.closer}" for call in written)


def _write_call(how: Calls, name: str, arguments: dict[str, object]) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    match how.form:
        case Form.NAMED:
            return f"{name}[ARGS]{text}"
        case Form.CHANNEL:
            return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text}"
        case Form.TAGGED:
            parts = (
                f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
                for key, value in arguments.items()
            )
            return f"<function={name}>\n{''.join(parts)}</function>"
    return f'{{{how.lead}"{how.name_key}": {json.dumps(name)}, "{how.arguments_key}": {text}}}'
