'''Modelfiles: recipes for models.

    # a comment, at the start of a line only
    FROM llama3                          a model, a GGUF file, or a digest; several for shards and projectors
    DRAFT llama3-small                   a smaller model that drafts for this one; named as in FROM
    PARAMETER temperature 0.5            PARAMETER stop "<|end|>" may be repeated, each adds one
    SYSTEM You are a pirate.
    TEMPLATE """{% for message in messages %}…{% endfor %}"""
    LICENSE MIT
    MESSAGE user Hello

Directives are words in any case, in any order. A value is the rest of its line without the spaces around it, or begins
with `"` or `"""` and ends where the same quotes end a line, so it may span lines. There are no escapes. An empty value
(`SYSTEM ""`) removes what the base has.

A name after FROM stands for a model with all it has, which is inherited. A digest (``sha256:…``) stands for bytes: a
GGUF, or the files of the manifest it names with nothing inherited. What drafts is inherited from a name as well, and
not from a digest. A model named after DRAFT gives its weights and nothing else.

Templates are Jinja, as in GGUF headers; Go templates are recognised and refused.
'''

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest, ModelfileProblem, ModelfileSyntax
from lmd.registry.lm_config import Message
from lmd.registry.parameters import IGNORED, ParameterValue, format_value, parse_text, validate

MAX_BYTES = 4 * 1024**2
MAX_PROBLEMS = 100
DIRECTIVES = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "LICENSE", "MESSAGE", "DRAFT")
NOT_YET = ("ADAPTER", "PROJECTOR", "QUANTIZE", "RENDERER", "PARSER", "REQUIRES")
MESSAGE_ROLES = ("system", "user", "assistant")

_ENCODINGS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_SPACES = " \t"
_WORD = re.compile(r"[^ \t]+")
_QUOTES = ('"""', '"')
# `{{ .System }}`, `{{- if .System }}`, `{{ $x := … }}`: none of them can begin a Jinja expression.
_GO_TEMPLATE = re.compile(r"\{\{-?\s*(?:\.[A-Za-z]|\$|(?:if|range|with|else if|template|define|block)\s+[.$(\"a-z])")


@dataclass(frozen=True, slots=True)
class From:
    """The argument of a FROM or a DRAFT as written, and where it stands."""

    value: str
    line: int = field(default=0, compare=False)
    column: int = field(default=0, compare=False)

    @property
    def digest(self) -> Digest | None:
        """The digest, when the argument is one (``sha256:…``): bytes of the store rather than a name or file."""
        return Digest.parse(self.value) if self.value.startswith("sha256:") else None


@dataclass(frozen=True, slots=True)
class Modelfile:
    """A parsed Modelfile.

    *template* and *system* are None when there is no such directive, and "" when there is an empty one, which removes
    what the base has; so is *drafts*, with () for an empty one. *warnings* are lines that have no effect here, such as
    settings of other engines.
    """

    from_: tuple[From, ...]
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    template: str | None = None
    system: str | None = None
    licenses: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    drafts: tuple[From, ...] | None = None
    warnings: tuple[ModelfileProblem, ...] = field(default=(), compare=False)

    @property
    def sources(self) -> tuple[From, ...]:
        """All that names a model, a file or bytes: the arguments of FROM, then those of DRAFT."""
        return self.from_ + (self.drafts or ())


def decode_modelfile(data: bytes) -> str:
    """Decode a Modelfile: UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ModelfileSyntax: at the first byte that is not text.
    """
    mark = next((mark for mark in _ENCODINGS if data.startswith(mark)), b"")
    encoding = _ENCODINGS.get(mark, "utf-8")
    body = data[len(mark) :]
    try:
        return body.decode(encoding)
    except UnicodeDecodeError as error:
        before = body[: error.start].decode(encoding, errors="replace")
        line_start = before.rpartition("\n")[2]
        problem = ModelfileProblem(
            before.count("\n") + 1, len(line_start) + 1, f"this is not text in {encoding.upper()}", _cut(line_start)
        )
        raise ModelfileSyntax([problem]) from None


def parse_modelfile(text: str) -> Modelfile:
    """Parse a Modelfile.

    Raises:
        ModelfileSyntax: with every mistake of the file, in order.
    """
    parser = _Parser(text)
    parser.run()
    if parser.problems:
        raise ModelfileSyntax(parser.problems)
    return Modelfile(
        from_=tuple(parser.from_),
        parameters=parser.parameters,
        template=parser.template,
        system=parser.system,
        licenses=tuple(parser.licenses),
        messages=tuple(parser.messages),
        drafts=None if parser.drafts is None else tuple(parser.drafts),
        warnings=tuple(parser.warnings),
    )


def is_go_template(text: str) -> bool:
    """Tell whether *text* is a template of the Go language, which Ollama's Modelfiles have and nobody here can read."""
    return _GO_TEMPLATE.search(text) is not None


def format_modelfile(modelfile: Modelfile) -> str:
    """Write a Modelfile that parses to an equal one.

    Raises:
        InvalidRequest: when there is no way to write a value: it has control characters, or lines that end in quotes of
            both kinds; the template is no Jinja; a message has a role that Modelfiles do not know. No parsed Modelfile
            has such a value.
    """
    if modelfile.template and is_go_template(modelfile.template):
        raise InvalidRequest("the text of TEMPLATE cannot be written in a Modelfile", field="TEMPLATE")
    if any(message.role not in MESSAGE_ROLES for message in modelfile.messages):
        raise InvalidRequest("the role of a MESSAGE cannot be written in a Modelfile", field="MESSAGE")
    lines = [f"FROM {_quoted(source.value, 'FROM')}" for source in modelfile.from_]
    if modelfile.drafts is not None:
        lines.extend(f"DRAFT {_quoted(source.value, 'DRAFT')}" for source in modelfile.drafts)
        if not modelfile.drafts:
            lines.append('DRAFT ""')
    if modelfile.template is not None:
        lines.append(f"TEMPLATE {_quoted(modelfile.template, 'TEMPLATE')}")
    if modelfile.system is not None:
        lines.append(f"SYSTEM {_quoted(modelfile.system, 'SYSTEM')}")
    for name, value in sorted(modelfile.parameters.items()):
        texts = value if isinstance(value, tuple) else (format_value(value),)
        lines.extend(f"PARAMETER {name} {_quoted(text, name)}" for text in texts)
    lines.extend(f"LICENSE {_quoted(text, 'LICENSE')}" for text in modelfile.licenses)
    lines.extend(f"MESSAGE {message.role} {_quoted(message.content, 'MESSAGE')}" for message in modelfile.messages)
    return "\n".join(lines) + "\n"


def _quoted(value: str, what: str) -> str:
    """The first of the ways to write *value* that reads back as it is."""
    bare = value if value.strip(_SPACES) == value and not value.startswith('"') else ""
    short, long = f'"{value}"', f'"""{value}"""'
    forms = (long, short) if "\n" in value else (bare, short, long)
    for form in filter(None, forms):
        lines = form.split("\n")
        if _scan_value(lines, 0, 0) == (value, len(lines)) and not _control_character(value):
            return form
    raise InvalidRequest(f"the text of {what} cannot be written in a Modelfile", field=what)


def _scan_value(lines: list[str], number: int, column: int) -> tuple[str, int] | None:
    """Read the value at *column* of line *number*; return it and the number of the line after it.

    None when a quoted value never ends.
    """
    first = lines[number][column:].strip(_SPACES)
    quotes = next((mark for mark in _QUOTES if first.startswith(mark)), "")
    if not quotes:
        return first, number + 1
    collected = [lines[number][column:].lstrip(_SPACES)]
    minimum = 2 * len(quotes)
    while True:
        last = collected[-1].rstrip(_SPACES)
        if last.endswith(quotes) and (len(collected) > 1 or len(last) >= minimum):
            collected[-1] = last
            return "\n".join(collected)[len(quotes) : -len(quotes)], number + len(collected)
        if number + len(collected) >= len(lines):
            return None
        collected.append(lines[number + len(collected)])


def _control_character(text: str) -> re.Match[str] | None:
    """Find a character that has no business in text: all control characters but tab and line feed, and surrogates."""
    return re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)


def _cut(line: str) -> str:
    return line[:200]


class _Parser:
    """Collects what the lines of one Modelfile say, and every mistake."""

    def __init__(self, text: str) -> None:
        self._lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
        self._text_bytes = len(text.encode("utf-8", "surrogatepass"))
        self.problems: list[ModelfileProblem] = []
        self.warnings: list[ModelfileProblem] = []
        self.from_: list[From] = []
        self.parameters: dict[str, ParameterValue] = {}
        self.template: str | None = None
        self.system: str | None = None
        self.licenses: list[str] = []
        self.messages: list[Message] = []
        self.drafts: list[From] | None = None

    def run(self) -> None:
        """Parse all lines."""
        if self._text_bytes > MAX_BYTES:
            self._problem(0, 0, f"the file has {self._text_bytes} bytes; at most {MAX_BYTES} are allowed")
            return
        self._check_characters()
        number = 0
        while number < len(self._lines) and len(self.problems) < MAX_PROBLEMS:
            line = self._lines[number]
            word = _WORD.search(line)
            if word is None or word[0].startswith("#"):
                number += 1
            else:
                number = self._directive(number, word)
        if not self.from_ and not self.problems:
            self._problem(0, 0, "there is no FROM; it names the model or the GGUF file to start from")

    def _check_characters(self) -> None:
        for number, line in enumerate(self._lines):
            if bad := _control_character(line):
                self._problem(number, bad.start(), f"U+{ord(bad[0]):04X} is a control character")
                return

    def _directive(self, number: int, word: re.Match[str]) -> int:
        """Parse the directive at *word*; return the number of the line after it."""
        name = word[0].upper()
        if name not in DIRECTIVES + NOT_YET:
            close = difflib.get_close_matches(name[:32], DIRECTIVES, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            legal = ", ".join(DIRECTIVES)
            self._problem(number, word.start(), f"unknown directive `{word[0][:32]}`{meant}; legal are {legal}")
            return number + 1
        column = word.end()
        key = ""
        if name in ("PARAMETER", "MESSAGE"):
            second = _WORD.search(self._lines[number], column)
            if second is None:
                what = "a name and a value" if name == "PARAMETER" else "a role and a text"
                self._problem(number, word.start(), f"{name} needs {what}")
                return number + 1
            key, column = second[0], second.end()
        first = _WORD.search(self._lines[number], column)
        if first is None:
            self._problem(number, word.start(), f'{name} needs a value; write "" for an empty one')
            return number + 1
        scanned = _scan_value(self._lines, number, column)
        if scanned is None:
            quotes = next(mark for mark in _QUOTES if first[0].startswith(mark))
            self._problem(number, first.start(), f"the text that begins here never ends; {quotes} must end a line")
            return len(self._lines)
        value, after = scanned
        self._take(name, key, value, number, first.start(), word.start())
        return after

    def _take(self, name: str, key: str, value: str, number: int, column: int, start: int) -> None:
        match name:
            case "FROM":
                if (source := self._source(name, value, number, column)) is not None:
                    self.from_.append(source)
            case "DRAFT":
                self._take_draft(value, number, column)
            case "PARAMETER":
                self._take_parameter(key, value, number, column, start)
            case "TEMPLATE":
                self._check_template(value, number, column)
                self.template = value
            case "SYSTEM":
                self.system = value
            case "LICENSE":
                self.licenses.append(value)
            case "MESSAGE":
                if key.lower() not in MESSAGE_ROLES:
                    at = self._lines[number].index(key, start + len(name))
                    legal = ", ".join(MESSAGE_ROLES)
                    self._problem(number, at, f"`{key[:32]}` is not a role of a message; legal are {legal}")
                self.messages.append(Message(key.lower(), value))
            case _:
                self._problem(number, start, f"{name} is not supported yet")

    def _source(self, name: str, value: str, number: int, column: int) -> From | None:
        """Read the argument of FROM or DRAFT; None after noting what is wrong with it."""
        source = From(value, number + 1, column + 1)
        if not value or "\n" in value:
            self._problem(number, column, f"{name} needs the name of a model or a file, on one line")
            return None
        try:
            _ = source.digest
        except InvalidRequest as error:
            self._problem(number, column, f"{error.message}; {error.hint}")
            return None
        return source

    def _take_draft(self, value: str, number: int, column: int) -> None:
        """Note one more file or model that drafts; an empty one takes away what came before it, here or in the base."""
        if not value:
            self.drafts = []
        elif (source := self._source("DRAFT", value, number, column)) is not None:
            self.drafts = [*(self.drafts or ()), source]

    def _take_parameter(self, key: str, value: str, number: int, column: int, start: int) -> None:
        name = key.lower()
        key_column = self._lines[number].index(key, start + len("PARAMETER"))
        if name in IGNORED:
            self.warnings.append(self._at(number, key_column, f"`{name}` has no effect here"))
            return
        try:
            parsed = parse_text(name, value)
            before = self.parameters.get(name)
            if isinstance(parsed, tuple) and isinstance(before, tuple):
                parsed = validate({name: before + parsed})[name]
        except InvalidRequest as error:
            known = error.message.startswith("unknown")
            hint = f"; {error.hint}" if error.hint else ""
            self._problem(number, key_column if known else column, error.message + hint)
            return
        self.parameters[name] = parsed

    def _check_template(self, value: str, number: int, column: int) -> None:
        found = _GO_TEMPLATE.search(value)
        if found is None:
            return
        # Where in the file the match is: the value starts after its quotes.
        line = self._lines[number]
        quotes = next((mark for mark in _QUOTES if line.startswith(mark, column)), "")
        before = value[: found.start()]
        rows = before.count("\n")
        at = column + len(quotes) + len(before) if not rows else len(before.rpartition("\n")[2])
        self._problem(
            number + rows,
            at,
            "this is a Go template; templates are Jinja here, such as {{ message.content }} — leave TEMPLATE out to "
            "use the one in the GGUF file",
        )

    def _problem(self, number: int, column: int, message: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(self._at(number, column, message))

    def _at(self, number: int, column: int, message: str) -> ModelfileProblem:
        line = self._lines[number] if number < len(self._lines) else ""
        return ModelfileProblem(number + 1, column + 1, message, _cut(line))
