"""What answers are held to: a format, or calls of functions, after the thoughts of a model that thinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lmd.runner.answer_style import gate_of
from lmd.runner.format_error import FormatError
from lmd.runner.formats import Formats
from lmd.runner.job import Constraint, Request
from lmd.runner.v1 import frames_pb2

if TYPE_CHECKING:
    from lmd.runner.forced_calls import CallGrammar


@runtime_checkable
class ThinksFirst(Protocol):
    """What `AfterThinking` is; that is loaded only when it is needed."""

    def opened(self) -> Constraint:
        """Return the same for an answer whose prompt ends inside thoughts."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why answers cannot be held to what a request asks for, and which field of it asks."""

    message: str
    field: str


def calls_are_forced(message: frames_pb2.Submit) -> bool:
    """Tell whether an answer must call a function."""
    chat = message.chat
    return bool(chat.tools) and (bool(chat.tool_name) or chat.tool_choice == frames_pb2.TOOL_CHOICE_REQUIRED)


def needs_constraint(message: frames_pb2.Submit) -> bool:
    """Tell whether answers are to be held to anything."""
    return message.HasField("format") or calls_are_forced(message)


def make_constraint(formats: Formats, request: Request) -> Constraint | Refusal:
    """Return what the answers to a request that has its prompt are held to, or why that is impossible.

    Where functions must be called an answer is calls and nothing else, so a format says nothing then. Blocks: call it
    in the thread of *formats*.
    """
    forced = calls_are_forced(request.message)
    field = "tools" if forced else "format"
    try:
        format_ = _call_grammar(request) if forced else request.message.format
    except FormatError as error:
        return Refusal(str(error), field)
    gate = gate_of(request.reading.style, calls=forced) if request.reading is not None else None
    made = formats.compile(format_, gate)
    if isinstance(made, FormatError):
        return Refusal(str(made), field)
    if request.opens_thoughts and isinstance(made, ThinksFirst):
        return made.opened()
    return made


def _call_grammar(request: Request) -> CallGrammar:
    from lmd.runner.forced_calls import call_grammar

    if request.reading is None:
        raise FormatError("the model's chat template knows no functions")
    return call_grammar(request.reading.style, request.reading.tools, request.message.chat.tool_name)
