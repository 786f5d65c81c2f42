"""The commands of a chat: everything that begins with a slash."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from lmd.cli.context import announce, note
from lmd.cli.describe import facts, parameter_pairs, part_text
from lmd.cli.errors import BadUsage, ClientError
from lmd.cli.output import print_facts
from lmd.cli.parameters import NAMES, set_parameter
from lmd.cli.repl.modelfile import session_modelfile
from lmd.cli.repl.reader import unquote_block
from lmd.v1 import inference_service_pb2 as inference_pb
from lmd.v1 import model_pb2
from lmd.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from lmd.cli.repl.session import Session

_HELP = """\
Commands
  /set parameter NAME VALUE    set a parameter, such as temperature 0.2
  /set system TEXT             replace the system prompt
  /set format FORMAT           make answers look like json, FILE.json (a schema),
                               FILE.gbnf or regex:EXPRESSION
  /set noformat                let answers look as they like
  /set think [LEVEL]           think before answering, or how much: low, medium, high
  /set nothink                 answer at once
  /set thoughts | nothoughts   print what the model thinks, or do not
  /set history | nohistory     keep what you type, or do not
  /set wordwrap | nowordwrap   break lines between words, or print text as it is
  /set markdown | nomarkdown   render Markdown, or do not
  /set verbose | quiet         print timings after each answer, or do not
  /show [PART]                 info, modelfile, parameters, system, template, license
  /load MODEL                  go on with another model and a new conversation
  /save NAME                   keep this model, its settings and the conversation
  /clear                       forget the conversation
  /bye                         leave

Typing
  \"\"\"                          begin a message of several lines, and end it
  Ctrl-C                       stop the answer
  Ctrl-D                       leave
  Up, Down                     what you typed before
  Tab                          complete a command"""

_SHOW_PARTS = ("info", "modelfile", "parameters", "system", "template", "license")
_SWITCHES = (
    "noformat",
    "think",
    "nothink",
    "thoughts",
    "nothoughts",
    "history",
    "nohistory",
    "wordwrap",
    "nowordwrap",
    "markdown",
    "nomarkdown",
    "verbose",
    "quiet",
)
_THINK_LEVELS = ("on", "low", "medium", "high")
_COMPLETION_TIMEOUT_S = 0.5


class Slash:
    """Obeys and completes the commands of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/help": self._help,
            "/load": self._load,
            "/save": self._save,
            "/set": self._set,
            "/show": self._show,
        }

    def obey(self, text: str) -> bool:
        """Run the command; return whether the session goes on.

        Raises:
            ClientError: there is no such command, or it fails.
        """
        word, _, rest = text.partition(" ")
        if word in ("/bye", "/exit", "/quit"):
            return False
        command = self._commands.get("/help" if word == "/?" else word)
        if command is None:
            raise BadUsage(f"no command `{word}`", hint=_close(word, [*self._commands, "/bye"]) or "see `/help`")
        command(rest.strip())
        return True

    def complete(self, before: str) -> Iterable[str]:
        """Return the words that may stand where the last word of *before* does."""
        *words, typed = before.split(" ")
        match words:
            case []:
                choices: Iterable[str] = [*self._commands, "/bye"]
            case ["/set"]:
                choices = ["parameter", "system", "format", *_SWITCHES]
            case ["/set", "parameter"]:
                choices = NAMES
            case ["/set", "think"]:
                choices = _THINK_LEVELS
            case ["/show"]:
                choices = _SHOW_PARTS
            case ["/load"]:
                choices = self._stored_names(typed)
            case _:
                choices = []
        return [choice for choice in choices if choice.startswith(typed)]

    def _stored_names(self, prefix: str) -> list[str]:
        models = self._session.client.models
        try:
            reply = self._session.client.call(
                lambda request: models.ListModels(request, timeout=_COMPLETION_TIMEOUT_S),
                pb.ListModelsRequest(prefix=prefix),
            )
        except ClientError:
            return []
        return [model.name for model in reply.models]

    def _help(self, _rest: str) -> None:
        click.echo(_HELP)

    def _clear(self, _rest: str) -> None:
        self._session.request.messages.clear()
        note("the conversation starts anew")

    def _load(self, rest: str) -> None:
        if not rest:
            raise BadUsage("which model?", hint="write `/load MODEL`")
        self._session.switch(rest)
        announce("loaded", self._session.name)

    def _save(self, rest: str) -> None:
        if not rest:
            raise BadUsage("under which name?", hint="write `/save NAME`")
        session = self._session
        said = session.request.messages if session.request.chats else []
        modelfile = session_modelfile(
            session.name,
            system=session.request.system,
            parameters=session.parameters,
            messages=[*session.request.model.messages, *said] if said else [],
        )
        request = pb.CreateModelRequest(name=rest, modelfile=modelfile)
        with session.client.stream(session.client.models.CreateModel, request) as events:
            for event in events:
                if event.HasField("model"):
                    announce("saved", event.model.name)

    def _show(self, rest: str) -> None:
        info = self._session.request.model
        part = rest or "info"
        if part not in _SHOW_PARTS:
            raise BadUsage(f"cannot show `{part}`", hint=f"one of {', '.join(_SHOW_PARTS)}")
        if part == "info":
            print_facts(facts(info, time.time(), see="/show "))
            return
        text = self._in_effect(part) or part_text(info, part)
        if text:
            click.echo(text)
        else:
            note(f"the model has no {part}")

    def _in_effect(self, part: str) -> str:
        """Return what the session has set over the model's own."""
        session = self._session
        if part == "system" and session.request.system is not None:
            return session.request.system
        if part == "parameters" and session.parameters.ListFields():
            merged = model_pb2.Parameters()
            merged.CopyFrom(session.request.model.parameters)
            for field, _ in session.parameters.ListFields():
                # A list replaces the model's as a whole, where merging would append to it.
                merged.ClearField(field.name)  # type: ignore[arg-type] # the name of a field
            merged.MergeFrom(session.parameters)
            return "\n".join(f"{name} {value}" for name, value in parameter_pairs(merged))
        return ""

    def _set(self, rest: str) -> None:
        what, _, value = rest.partition(" ")
        session = self._session
        match what:
            case "parameter":
                self._set_parameter(value)
            case "system":
                session.request.system = unquote_block(value)
                note("system prompt set" if session.request.system else "no system prompt")
            case "format":
                self._set_format(value)
            case "noformat":
                session.options.ClearField("format")
                note("answers look as they like")
            case "think":
                self._set_think(value)
            case "nothink":
                session.request.think = inference_pb.THINK_OFF
                note("answers begin at once")
            case "thoughts" | "nothoughts":
                session.request.hides_thoughts = what == "nothoughts"
                note("thoughts are not printed" if session.request.hides_thoughts else "thoughts are printed")
            case "history" | "nohistory":
                session.reader.remember(what == "history")
                note("what you type is kept" if what == "history" else "what you type is not kept")
            case "wordwrap" | "nowordwrap":
                session.wordwrap = what == "wordwrap"
                note("lines break between words" if session.wordwrap else "text is printed as it is")
            case "markdown" | "nomarkdown":
                session.markdown = what == "markdown"
                note("Markdown is rendered" if session.markdown else "Markdown is printed as it is")
            case "verbose" | "quiet":
                session.timings = what == "verbose"
                note("timings are printed" if session.timings else "timings are not printed")
            case _:
                hint = _close(what, ["parameter", "system", "format", *_SWITCHES]) if what else ""
                raise BadUsage(f"cannot set `{what}`" if what else "set what?", hint=hint or "see `/help`")

    def _set_format(self, text: str) -> None:
        from lmd.cli.formats import HINT, parse_format

        if not text:
            raise BadUsage("which format?", hint=HINT)
        self._session.options.format.CopyFrom(parse_format(text))
        note("answers look like that from now on")

    def _set_think(self, level: str) -> None:
        if (level or "on") not in _THINK_LEVELS:
            raise BadUsage(f"cannot think `{level}`", hint=f"one of {', '.join(_THINK_LEVELS)}")
        model = self._session.request.model.model
        if "thinking" not in model.capabilities:
            raise BadUsage(f"{model.name} does not think", hint="`lm show` lists what a model can do")
        self._session.request.think = inference_pb.Think.Value(f"THINK_{(level or 'on').upper()}")
        note("answers begin with thoughts")

    def _set_parameter(self, rest: str) -> None:
        import shlex

        try:
            name, *values = shlex.split(rest)
        except ValueError as error:
            if rest:
                raise BadUsage(f"cannot read `{rest}`: {str(error).lower()}") from None
            raise BadUsage("which parameter?", hint="write `/set parameter NAME VALUE`") from None
        parameters = self._session.parameters
        # Lists are set anew each time; and what cannot be set leaves all as it was.
        changed = model_pb2.Parameters()
        set_parameter(changed, name, values)
        parameters.ClearField(name)  # type: ignore[arg-type] # one of its fields, or set_parameter had refused it
        parameters.MergeFrom(changed)
        note(f"{name} is {' '.join(values)}" if values else f"{name} is what the model says")


def _close(word: str, choices: Iterable[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, list(choices), n=2)
    return f"did you mean {' or '.join(f'`{choice}`' for choice in close)}?" if close else ""
