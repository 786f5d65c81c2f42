"""Turns a body of `/v1/responses` into what inference takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from lmd.daemon.answer_options import AnswerOptions, ContextPolicy, Format, FormatKind
from lmd.daemon.conversations import Think, Tool, ToolCall, ToolChoice, Tools, Turn
from lmd.daemon.http.openai.options import CHAT_DEFAULTS
from lmd.daemon.http.openai.responses_requests import FunctionTool, Item, Part, ResponseRequest, TextFormat
from lmd.daemon.http.thinking import EFFORTS
from lmd.registry.errors import InvalidRequest

LOGPROBS = "message.output_text.logprobs"
#: What OpenAI uses when a request asks for log probabilities without saying of how many alternatives.
DEFAULT_TOP_LOGPROBS = 0

_POLICIES = {"auto": ContextPolicy.TRUNCATE, "disabled": ContextPolicy.ERROR}
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_CHOICES = {"none": ToolChoice.NONE, "auto": ToolChoice.AUTO, "required": ToolChoice.REQUIRED}


def refuse_state(request: ResponseRequest) -> None:
    """Refuse what needs a memory of earlier responses.

    Raises:
        InvalidRequest: with the field.
    """
    hint = "send the whole conversation in `input`"
    if request.previous_response_id is not None:
        raise InvalidRequest(
            "`previous_response_id` cannot be followed: responses are not stored",
            field="previous_response_id",
            hint=hint,
        )
    if request.conversation is not None:
        raise InvalidRequest(
            "`conversation` is not supported: conversations are not stored", field="conversation", hint=hint
        )
    if request.prompt is not None:
        raise InvalidRequest(
            "`prompt` is not supported: there are no stored prompts", field="prompt", hint="use `instructions`"
        )
    if request.background:
        raise InvalidRequest("`background` is not supported: responses are not stored", field="background")


def turns_of(request: ResponseRequest) -> list[Turn]:
    """Return the conversation: the instructions, and the items put together to turns.

    What the assistant thought, said and called in one go are items of their own here, and one turn for a template.

    Raises:
        InvalidRequest: an item is of a type that cannot be read, lacks a field, or answers a call that nobody made.
    """
    turns = _Turns()
    if request.instructions:
        turns.say("system", request.instructions)
    for number, item in enumerate(request.input):
        _add(turns, item, f"input[{number}]")
    return turns.done()


class _Turns:
    """Turns in the making; what is known of the assistant's next one waits for what still belongs to it."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []
        self._names: dict[str, str] = {}
        self._thinking = ""
        self._content: str | None = None
        self._calls: list[ToolCall] = []

    def think(self, text: str) -> None:
        if self._content is not None or self._calls:
            self._close()
        self._thinking += text

    def answer(self, text: str) -> None:
        if self._content is not None or self._calls:
            self._close()
        self._content = text

    def call(self, call: ToolCall) -> None:
        self._names[call.id] = call.name
        self._calls.append(call)

    def result(self, call_id: str, text: str) -> bool:
        """Add the result of a call; tell whether there was one."""
        self._close()
        name = self._names.get(call_id)
        if name is None:
            return False
        self._turns.append(Turn("tool", text, tool_name=name, tool_call_id=call_id))
        return True

    def say(self, role: str, text: str) -> None:
        self._close()
        if role == "system" and len(self._turns) == 1 and self._turns[0].role == "system":
            # Many templates take one system message only, and that first.
            self._turns[0] = Turn("system", f"{self._turns[0].content}\n\n{text}")
        else:
            self._turns.append(Turn(role, text))

    def done(self) -> list[Turn]:
        self._close()
        return self._turns

    def _close(self) -> None:
        if self._thinking or self._content is not None or self._calls:
            self._turns.append(Turn("assistant", self._content or "", self._thinking, tuple(self._calls)))
        self._thinking, self._content, self._calls = "", None, []


def _add(turns: _Turns, item: Item, field: str) -> None:
    match item.type:
        case "message" | None:
            if item.role is None:
                _missing(field, "role")
            text = _text(item.content, f"{field}.content")
            if item.role == "assistant":
                turns.answer(text)
            else:
                turns.say("system" if item.role == "developer" else item.role, text)
        case "function_call":
            if item.name is None:
                _missing(field, "name")
            if item.call_id is None:
                _missing(field, "call_id")
            turns.call(ToolCall(item.call_id, item.name, _arguments(item.arguments, f"{field}.arguments")))
        case "function_call_output":
            if item.call_id is None:
                _missing(field, "call_id")
            if not turns.result(item.call_id, _text(item.output, f"{field}.output")):
                raise InvalidRequest(
                    f"`{field}` answers the call {item.call_id[:80]!a}, which no item before it makes",
                    field=f"{field}.call_id",
                    hint="send the `function_call` items as well: responses are not stored",
                )
        case "reasoning":
            turns.think(_text(item.content or item.summary or [], f"{field}.summary"))
        case _:
            raise InvalidRequest(
                f"`{field}` is of type {item.type[:80]!a}, which is not supported",
                field=f"{field}.type",
                hint="items are `message`, `function_call`, `function_call_output` and `reasoning`",
            )


def _text(parts: Sequence[Part] | None, field: str) -> str:
    if parts is None:
        raise InvalidRequest(f"`{field}` is missing", field=field)
    texts: list[str] = []
    for number, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type == "refusal" or part.type in _TEXTS:
            if text is None:
                _missing(f"{field}[{number}]", "refusal" if part.type == "refusal" else "text")
            texts.append(text)
        else:
            raise InvalidRequest(
                f"`{field}[{number}]` is of type {part.type[:80]!a}; only text can be read",
                field=f"{field}[{number}].type",
            )
    return "\n".join(texts)


def _arguments(text: str | None, field: str) -> str:
    if text is None or not text.strip():
        return "{}"
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"`{field}` is not JSON: {error}", field=field) from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"`{field}` is no JSON object", field=field)
    return text


def _missing(field: str, name: str) -> NoReturn:
    raise InvalidRequest(f"`{field}.{name}` is missing", field=f"{field}.{name}")


def tools_of(request: ResponseRequest) -> Tools | None:
    """Return the functions that may be called, None when the request has no tools.

    Raises:
        InvalidRequest: a tool is no function, or `tool_choice` asks for what cannot be.
    """
    tools = [_tool(number, tool) for number, tool in enumerate(request.tools or ())]
    choice = request.tool_choice
    if choice is None:
        return Tools(tuple(tools)) if tools else None
    if choice.type in _CHOICES:
        if not tools and choice.type != "required":
            return None
        return Tools(tuple(tools), _CHOICES[choice.type])
    if choice.type == "function":
        if choice.name is None:
            _missing("tool_choice", "name")
        return Tools(tuple(tools), ToolChoice.REQUIRED, choice.name)
    if choice.type == "allowed_tools":
        if any(tool.type != "function" for tool in choice.tools or ()):
            raise InvalidRequest("`tool_choice.tools` names a tool that is no function", field="tool_choice.tools")
        allowed = {tool.name for tool in choice.tools or ()}
        if unknown := allowed - {tool.name for tool in tools}:
            raise InvalidRequest(
                f"`tool_choice.tools` names {str(min(map(str, unknown)))[:80]!a}, which is not in `tools`",
                field="tool_choice.tools",
            )
        return Tools(tuple(tool for tool in tools if tool.name in allowed), _CHOICES[choice.mode or "auto"])
    raise InvalidRequest(
        f"`tool_choice` {choice.type[:80]!a} is not supported",
        field="tool_choice",
        hint='it is "none", "auto", "required", or the name of a function',
    )


def _tool(number: int, tool: FunctionTool) -> Tool:
    field = f"tools[{number}]"
    if tool.type != "function":
        raise InvalidRequest(
            f"`{field}` is of type {tool.type[:80]!a}; only functions can be called", field=f"{field}.type"
        )
    if tool.name is None:
        _missing(field, "name")
    return Tool(tool.name, tool.description or "", json.dumps(tool.parameters) if tool.parameters else "")


def think_of(request: ResponseRequest) -> Think | None:
    """Return whether the model is to think, None when the request leaves it to the model."""
    effort = request.reasoning.effort if request.reasoning else None
    return None if effort is None else EFFORTS[effort]


def options_of(request: ResponseRequest) -> AnswerOptions:
    """Return what the answer is asked to be.

    Raises:
        InvalidRequest: there are two formats, or one that says nothing.
    """
    return AnswerOptions(
        format=_format(request.text.format if request.text else None, request.grammar),
        top_logprobs=top_logprobs_of(request.top_logprobs, request.include),
        context_policy=_POLICIES[request.truncation or "disabled"],
        defaults=CHAT_DEFAULTS,
    )


def top_logprobs_of(top_logprobs: int | None, include: Iterable[str] | None) -> int | None:
    """Return of how many alternatives log probabilities are told, None for none at all."""
    if top_logprobs is not None and top_logprobs > 0:
        return top_logprobs
    return DEFAULT_TOP_LOGPROBS if LOGPROBS in (include or ()) else None


def _format(wanted: TextFormat | None, grammar: str | None) -> Format | None:
    if grammar is not None:
        if wanted is not None and wanted.type != "text":
            raise InvalidRequest("`grammar` and `text.format` exclude each other", field="grammar")
        return Format(FormatKind.GBNF, grammar)
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Format(FormatKind.JSON_OBJECT)
    if wanted.schema_ is None:
        _missing("text.format", "schema")
    return Format(FormatKind.JSON_SCHEMA, json.dumps(wanted.schema_))


def parameters_of(request: ResponseRequest) -> Mapping[str, object]:
    """Return the settings that the request names; those that it leaves out are the model's own."""
    wanted = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "num_predict": request.max_output_tokens,
        "seed": request.seed,
        "num_ctx": request.num_ctx,
    }
    return {name: value for name, value in wanted.items() if value is not None}
