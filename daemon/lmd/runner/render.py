"""The child of a runner that renders chat templates, which are programs that came with a model.

Run as `python -m lmd.runner.render --fd N`. It compiles a template in jinja2's immutable sandbox, with memory, file and
process limits, and renders turns with it, one request at a time. Time is the runner's to watch: a template cannot be
interrupted from inside, so the runner kills this process and starts another. Go templates, which Ollama's models have,
are told by their text, and interpreted.

Frames (see `wire`), from the runner: a JSON object with `template`, `bos_token`, `eos_token`, `max_bytes`; then one
serialized `Chat` for each prompt. A chat may bring its own template, and must when the first `template` is empty. From
here, each answering one of those, after a first `ready` of its own: a tag byte (`TAG_OK`, `TAG_ERROR`) and the text.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import resource
import socket
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lmd.gotemplate.errors import TemplateError
from lmd.gotemplate.survey import is_go_template
from lmd.runner.chat_values import is_none, template_values
from lmd.runner.confine import drop_rights, tie_to_parent
from lmd.runner.go_chat import GoRenderer
from lmd.runner.v1 import frames_pb2
from lmd.runner.wire import WireClosed, WireError, frame, read_frame

TAG_OK = b"P"
TAG_ERROR = b"E"

_MESSAGE_CHARACTERS = 300
# Templates that requests bring, for those that bring the same one again.
_KEPT_TEMPLATES = 4
_WORKING_BYTES = 256 << 20
# Enough for the standard streams, the socket, and a module that Python imports late.
_OPEN_FILES = 16
# Raised exceptions of Python's own: what a template does wrong, not what is wrong with this program.
_TEMPLATE_ERRORS = (
    TemplateError,
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


class PromptTooLong(Exception):
    """Raised when a rendered prompt exceeds its limit."""


class _IgnoreGeneration(jinja2.ext.Extension):
    """Accepts `{% generation %}`, with which templates mark what the assistant said, and renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Renderer:
    """A compiled chat template, with the environment that templates on the Hub are written for.

    Source: transformers' `apply_chat_template` (blocks trimmed, loop controls, `raise_exception`, `strftime_now`,
    `tojson` without HTML escaping).
    """

    def __init__(self, template: str, *, bos_token: str, eos_token: str, max_bytes: int) -> None:
        """Compile it.

        Raises:
            jinja2.TemplateSyntaxError: it does not compile.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_IgnoreGeneration, jinja2.ext.loopcontrols],
            # A template's output is a prompt, not a page.
            autoescape=False,
        )
        environment.filters["tojson"] = _to_json
        environment.tests["none"] = is_none
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._source = template
        self._template = environment.from_string(template)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._max_bytes = max_bytes

    def render_chat(self, chat: frames_pb2.Chat) -> str:
        """Return the prompt for a chat; raises as `render`."""
        return self.render(template_values(chat, self._source))

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the prompt for the variables that the template gets.

        Raises:
            PromptTooLong: the output exceeds the limit.
            jinja2.TemplateError, ...: the template fails; any of the built-in exceptions as well.
        """
        parts: list[str] = []
        size_bytes = 0
        for part in self._template.generate(**values, **self._tokens):
            size_bytes += len(part.encode())
            if size_bytes > self._max_bytes:
                raise PromptTooLong(f"it renders more than {self._max_bytes} bytes")
            parts.append(part)
        return "".join(parts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format_: str) -> str:
    # Local time, as the authors of templates expect: it ends up in "today is" lines.
    return datetime.datetime.now().astimezone().strftime(format_)


def describe_error(error: BaseException) -> str:
    """Return one short line that says what went wrong in the template's own terms."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        text = f"line {error.lineno}: {error.message}"
    elif isinstance(error, RecursionError):
        text = "it nests too deeply"
    elif isinstance(error, MemoryError):
        text = "it needs too much memory"
    elif isinstance(error, TemplateError | jinja2.TemplateError | PromptTooLong):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    line = "".join(character if character.isprintable() else " " for character in text)
    return line[:_MESSAGE_CHARACTERS] or type(error).__name__


def _limit(max_bytes: int) -> None:
    """Keep a template that has escaped the sandbox, or blows up in it, from taking more than this process."""
    with open("/proc/self/statm") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    room_bytes = used_bytes + _WORKING_BYTES + 8 * max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (room_bytes, room_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))


def serve(connection: socket.socket) -> None:
    """Answer until the runner hangs up."""

    def answer(tag: bytes, text: str) -> None:
        connection.sendall(frame(tag + text.encode(errors="replace")))

    answer(TAG_OK, "ready")
    setup = json.loads(read_frame(connection))
    _limit(setup["max_bytes"])

    @functools.lru_cache(maxsize=_KEPT_TEMPLATES)
    def compiled(template: str) -> Renderer | GoRenderer:
        if is_go_template(template):
            return GoRenderer(template, max_bytes=setup["max_bytes"])
        return Renderer(
            template, bos_token=setup["bos_token"], eos_token=setup["eos_token"], max_bytes=setup["max_bytes"]
        )

    try:
        renderer = compiled(setup["template"]) if setup["template"] else None
    except (*_TEMPLATE_ERRORS, RecursionError, MemoryError, SyntaxError) as error:
        answer(TAG_ERROR, describe_error(error))
        return
    answer(TAG_OK, "")
    while True:
        chat = frames_pb2.Chat.FromString(read_frame(connection))
        try:
            prompt = (renderer if renderer and not chat.template else compiled(chat.template)).render_chat(chat)
        except (*_TEMPLATE_ERRORS, RecursionError, MemoryError, SyntaxError, PromptTooLong) as error:
            answer(TAG_ERROR, describe_error(error))
        else:
            answer(TAG_OK, prompt)


def main() -> int:
    """Render for the runner at the other end of the socket."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    connection = socket.socket(fileno=parser.parse_args().fd)
    tie_to_parent()
    drop_rights()
    try:
        serve(connection)
    except (WireClosed, WireError, ConnectionError):
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
