"""Turns a body of Anthropic's API into what inference takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from lmd.daemon import conversations
from lmd.daemon.answer_options import AnswerOptions, Format, FormatKind
from lmd.daemon.conversations import Think, Tool, ToolCall, Tools, Turn
from lmd.daemon.http.anthropic.errors import ThreadUnsupported
from lmd.daemon.http.anthropic.requests import Block, CountRequest, Message, MessageRequest, ResultBlock
from lmd.daemon.http.thinking import EFFORTS
from lmd.registry.errors import InvalidRequest
from lmd.registry.parameters import ParameterValue

#: What Anthropic promises where nobody says anything; a model's manifest does say something.
DEFAULTS: Mapping[str, ParameterValue] = {"temperature": 1.0, "top_p": 1.0}

_CHOICES = {
    "auto": conversations.ToolChoice.AUTO,
    "any": conversations.ToolChoice.REQUIRED,
    "tool": conversations.ToolChoice.REQUIRED,
    "none": conversations.ToolChoice.NONE,
}


def turns_of(request: CountRequest) -> list[Turn]:
    """Return the conversation.

    A message of a user can hold results of tools; each is a turn of its own. Several texts of one turn are joined by
    newlines.

    Raises:
        ThreadUnsupported: it is the continuation of one that was to be held here, or the beginning.
        InvalidRequest: a block cannot be read, lacks a field, or is the result of a call that nobody made.
    """
    if request.thread is not None:
        raise ThreadUnsupported
    turns: list[Turn] = []
    if request.system:
        turns.append(Turn("system", _texts(request.system, "system")))
    names: dict[str, str] = {}
    if not request.messages:
        raise InvalidRequest("`messages` has no message", field="messages")
    for number, message in enumerate(request.messages):
        field = f"messages[{number}].content"
        if message.role == "assistant":
            turn = _assistant(message, field)
            names.update((call.id, call.name) for call in turn.tool_calls)
            turns.append(turn)
        else:
            turns += _others(message, field, names)
    return turns


def _assistant(message: Message, field: str) -> Turn:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for number, block in enumerate(message.content):
        where = f"{field}[{number}]"
        match block.type:
            case "text":
                texts.append(_required(block.text, where, "text"))
            case "thinking":
                thoughts.append(_required(block.thinking, where, "thinking"))
            case "redacted_thinking":
                pass  # Nobody but Anthropic can read it.
            case "tool_use":
                call_id, name = _required(block.id, where, "id"), _required(block.name, where, "name")
                calls.append(ToolCall(call_id, name, json.dumps(block.input or {}, ensure_ascii=False)))
            case _:
                _refuse(block.type, where)
    return Turn("assistant", "\n".join(texts), "\n".join(thoughts), tuple(calls))


def _others(message: Message, field: str, names: Mapping[str, str]) -> Iterable[Turn]:
    texts: list[str] = []
    for number, block in enumerate(message.content):
        where = f"{field}[{number}]"
        if block.type == "text":
            texts.append(_required(block.text, where, "text"))
        elif block.type == "tool_result" and message.role == "user":
            if texts:
                yield Turn("user", "\n".join(texts))
                texts = []
            yield _result(block, where, names)
        else:
            _refuse(block.type, where)
    if texts or not message.content:
        yield Turn(message.role, "\n".join(texts))


def _result(block: Block, field: str, names: Mapping[str, str]) -> Turn:
    call_id = _required(block.tool_use_id, field, "tool_use_id")
    if call_id not in names:
        raise InvalidRequest(
            f"`{field}` is the result of {call_id[:80]!a}, which no `tool_use` block before it has as its id",
            field=f"{field}.tool_use_id",
        )
    text = _texts(block.content or [], f"{field}.content")
    return Turn("tool", text, tool_name=names[call_id], tool_call_id=call_id)


def _texts(blocks: Sequence[ResultBlock], field: str) -> str:
    texts: list[str] = []
    for number, block in enumerate(blocks):
        where = f"{field}[{number}]"
        if block.type != "text":
            _refuse(block.type, where)
        texts.append(_required(block.text, where, "text"))
    return "\n".join(texts)


def _required(value: str | None, field: str, name: str) -> str:
    if value is None:
        raise InvalidRequest(f"`{field}.{name}` is missing", field=f"{field}.{name}")
    return value


def _refuse(kind: str, field: str) -> NoReturn:
    if kind == "image":
        raise InvalidRequest(f"`{field}` is an image: models here read text only", field=field)
    raise InvalidRequest(f"`{field}` is of type {kind[:80]!a}, which is not supported there", field=f"{field}.type")


def tools_of(request: CountRequest) -> Tools | None:
    """Return the functions that may be called, None when the request has no tools.

    Raises:
        InvalidRequest: a tool is one that Anthropic's servers run, or `tool_choice` names none.
    """
    tools: list[Tool] = []
    for number, tool in enumerate(request.tools or ()):
        if tool.type not in (None, "custom"):
            raise InvalidRequest(
                f"`tools[{number}]` is of type {tool.type[:80]!a}, which only Anthropic's servers can run",
                field=f"tools[{number}].type",
            )
        schema = "" if tool.input_schema is None else json.dumps(tool.input_schema, ensure_ascii=False)
        tools.append(Tool(tool.name, tool.description or "", schema))
    choice = request.tool_choice
    if choice is None:
        return Tools(tuple(tools)) if tools else None
    only = _required(choice.name, "tool_choice", "name") if choice.type == "tool" else ""
    if not tools and choice.type in ("auto", "none"):
        return None
    return Tools(tuple(tools), _CHOICES[choice.type], only)


def think_of(request: CountRequest) -> Think | None:
    """Return whether the model is to think; who does not ask gets no thoughts, as clients expect it."""
    if request.thinking is None or request.thinking.type == "disabled":
        return Think.OFF
    effort = request.output_config.effort if request.output_config else None
    return Think.ON if effort is None else EFFORTS[effort]


def options_of(request: MessageRequest) -> AnswerOptions:
    """Return what the answer is asked to be."""
    wanted = request.output_config.format if request.output_config else None
    schema = None if wanted is None else Format(FormatKind.JSON_SCHEMA, json.dumps(wanted.schema_, ensure_ascii=False))
    return AnswerOptions(format=schema, defaults=DEFAULTS)


def parameters_of(request: MessageRequest) -> Mapping[str, object]:
    """Return the settings that the request names; those that it leaves out are the model's own."""
    wanted = {
        "num_predict": request.max_tokens,
        "stop": request.stop_sequences or None,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
        "num_ctx": request.num_ctx,
    }
    return {name: value for name, value in wanted.items() if value is not None}
