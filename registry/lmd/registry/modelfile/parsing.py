"""Reading Modelfiles: every mistake of a file in one go."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from lmd.registry.errors import InvalidRequest, ModelfileProblem, ModelfileSyntax
from lmd.registry.lm_config import Message
from lmd.registry.modelfile.arguments import read_quantization, read_scale, read_version, split_adapter
from lmd.registry.modelfile.foreign import FOREIGN
from lmd.registry.modelfile.templates import why_not
from lmd.registry.modelfile.text import (
    QUOTES,
    SPACES,
    binary_character,
    control_character,
    cut,
    raw_column,
    scan_value,
    split_lines,
    without_controls,
)
from lmd.registry.modelfile.values import DIRECTIVES, MESSAGE_ROLES, Adapter, From, Modelfile
from lmd.registry.parameters import IGNORED, ParameterValue, parse_text, validate

MAX_BYTES = 4 * 1024**2
MAX_PROBLEMS = 100
MAX_ADAPTERS = 64

_WORD = re.compile(r"[^ \t]+")
_DIRECTIVE = re.compile(r"[A-Za-z][A-Za-z_]{0,31}")


def parse_modelfile(text: str) -> Modelfile:
    """Parse a Modelfile.

    Raises:
        ModelfileSyntax: with every mistake of the file, in order.
    """
    parser = _Parser(text)
    parser.run()
    if parser.problems:
        raise ModelfileSyntax(sorted(parser.problems, key=lambda problem: (problem.line, problem.column)))
    return replace(
        parser.found,
        from_=tuple(parser.from_),
        parameters=parser.parameters,
        licenses=tuple(parser.licenses),
        messages=tuple(parser.messages),
        warnings=tuple(parser.warnings),
    )


class _Parser:
    """Collects what the lines of one Modelfile say, and every mistake."""

    def __init__(self, text: str) -> None:
        self._raw = split_lines(text)
        self._lines = [without_controls(line) for line in self._raw]
        self._text_bytes = len(text.encode("utf-8", "surrogatepass"))
        self.problems: list[ModelfileProblem] = []
        self.warnings: list[ModelfileProblem] = []
        self.from_: list[From] = []
        self.parameters: dict[str, ParameterValue] = {}
        self.licenses: list[str] = []
        self.messages: list[Message] = []
        #: What directives that do not add up have said.
        self.found = Modelfile(())

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
        dropped = 0
        first: ModelfileProblem | None = None
        for number, line in enumerate(self._raw):
            if bad := binary_character(line):
                self.problems.append(_at_raw(number, bad.start(), line, _not_text(bad[0])))
                return
            if bad := control_character(line):
                dropped += len(line) - len(self._lines[number])
                first = first or _at_raw(number, bad.start(), line, f"U+{ord(bad[0]):04X} is a control character")
        if first is not None:
            what = "it is dropped" if dropped == 1 else f"it and {dropped - 1} more are dropped"
            self.warnings.append(replace(first, message=f"{first.message}; {what}"))

    def _directive(self, number: int, word: re.Match[str]) -> int:
        """Parse the directive at *word*; return the number of the line after it."""
        name = word[0].upper()
        if name not in DIRECTIVES:
            return self._unknown(number, word)
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
            self._problem(number, word.start(), _needs_value(name))
            return number + 1
        if name == "ADAPTER" and self._take_adapter(number, first.start()):
            return number + 1
        scanned = scan_value(self._lines, number, column)
        if scanned is None:
            quotes = next(mark for mark in QUOTES if first[0].startswith(mark))
            self._problem(number, first.start(), f"the text that begins here never ends; {quotes} must end a line")
            return len(self._lines)
        value, after = scanned
        self._take(name, key, value, number, first.start(), word.start())
        return after

    def _unknown(self, number: int, word: re.Match[str]) -> int:
        """Note a directive that is none, and step over its value so that no line of that is taken for one."""
        name, shown = word[0].upper(), word[0][:32]
        close = difflib.get_close_matches(name[:32], DIRECTIVES, 1)
        if name in FOREIGN:
            self._problem(number, word.start(), f"{name} cannot be used here: {FOREIGN[name]}")
        else:
            meant = f" (did you mean {close[0]}?)" if close else ""
            self._problem(
                number, word.start(), f"unknown directive `{shown}`{meant}; legal are {', '.join(DIRECTIVES)}"
            )
        rest = self._lines[number][word.end() :].lstrip(SPACES)
        scanned = scan_value(self._lines, number, word.end()) if rest.startswith(QUOTES) else None
        well_formed = _DIRECTIVE.fullmatch(word[0]) is not None
        return scanned[1] if scanned is not None and well_formed else number + 1

    def _take(self, name: str, key: str, value: str, number: int, column: int, start: int) -> None:
        match name:
            case "FROM":
                if (source := self._source(name, value, number, column)) is not None:
                    self.from_.append(source)
            case "DRAFT" | "PROJECTOR":
                self._take_sources(name, value, number, column)
            case "ADAPTER":
                self._problem(number, column, "ADAPTER needs the path of a file, on one line")
            case "PARAMETER":
                self._take_parameter(key, value, number, column, start)
            case "TEMPLATE":
                self._check_template(value, number, column)
                self.found = replace(self.found, template=value)
            case "SYSTEM":
                self.found = replace(self.found, system=value)
            case "LICENSE":
                self.licenses.append(value)
            case "QUANTIZE" | "REQUIRES":
                self._take_word(name, value, number, column)
            case _:
                self._take_message(key, value, number, start)

    def _take_message(self, key: str, value: str, number: int, start: int) -> None:
        if key.lower() not in MESSAGE_ROLES:
            at = self._lines[number].index(key, start + len("MESSAGE"))
            legal = ", ".join(MESSAGE_ROLES)
            self._problem(number, at, f"`{key[:32]}` is not a role of a message; legal are {legal}")
        self.messages.append(Message(key.lower(), value))

    def _source(self, name: str, value: str, number: int, column: int) -> From | None:
        """Read an argument that names a model or a file; None after noting what is wrong with it."""
        source = From(value, number + 1, self._column(number, column))
        if not value or "\n" in value:
            what = "the name of a model or a file" if name in ("FROM", "DRAFT") else "the path of a file"
            self._problem(number, column, f"{name} needs {what}, on one line")
            return None
        try:
            _ = source.digest
        except InvalidRequest as error:
            self._problem(number, column, f"{error.message}; {error.hint}")
            return None
        return source

    def _take_sources(self, name: str, value: str, number: int, column: int) -> None:
        """Note one more file or model; an empty one takes away what came before it, here or in the base."""
        if name == "DRAFT":
            before = self.found.drafts or ()
            if not value:
                self.found = replace(self.found, drafts=())
            elif (source := self._source(name, value, number, column)) is not None:
                self.found = replace(self.found, drafts=(*before, source))
        elif not value:
            self.found = replace(self.found, projectors=())
        elif self.found.projectors:
            first = self.found.projectors[0]
            self._problem(number, column, f"a model has one projector at most; line {first.line} names it already")
        elif (source := self._source(name, value, number, column)) is not None:
            self.found = replace(self.found, projectors=(source,))

    def _take_adapter(self, number: int, column: int) -> bool:
        """Read an ADAPTER that is on one line; tell whether it is."""
        text = self._lines[number][column:].rstrip(SPACES)
        path, scale_text = split_adapter(text)
        if path == text and text.startswith('"'):
            return False
        if not path:
            if scale_text:
                self._problem(number, column, "ADAPTER needs the path of a file before the scale")
            else:
                self.found = replace(self.found, adapters=())
            return True
        source = self._source("ADAPTER", path, number, column)
        try:
            scale = read_scale(scale_text)
        except InvalidRequest as error:
            at = column + len(text) - len(scale_text)
            self._problem(number, at, f"{error.message}; {error.hint}")
            return True
        before = self.found.adapters or ()
        if source is not None and any(adapter.source == source for adapter in before):
            self._problem(number, column, "this adapter is named twice; give it one scale")
        elif source is not None and len(before) == MAX_ADAPTERS:
            self._problem(number, column, f"a model has at most {MAX_ADAPTERS} adapters")
        elif source is not None:
            self.found = replace(self.found, adapters=(*before, Adapter(source, scale)))
        return True

    def _take_word(self, name: str, value: str, number: int, column: int) -> None:
        try:
            if name == "QUANTIZE":
                self.found = replace(self.found, quantize=read_quantization(value))
            else:
                self.found = replace(self.found, requires=read_version(value))
        except InvalidRequest as error:
            self._problem(number, column, f"{error.message}; {error.hint}")

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
        problem = why_not(value)
        if problem is None:
            return
        # Where in the file that is: the value starts after its quotes.
        line = self._lines[number]
        quotes = next((mark for mark in QUOTES if line.startswith(mark, column)), "")
        at = problem.column - 1 if problem.line > 1 else column + len(quotes) + problem.column - 1
        self._problem(number + problem.line - 1, at, f"the template does not compile: {problem.message}")

    def _problem(self, number: int, column: int, message: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(self._at(number, column, message))

    def _at(self, number: int, column: int, message: str) -> ModelfileProblem:
        line = self._raw[number] if number < len(self._raw) else ""
        return ModelfileProblem(number + 1, self._column(number, column), message, cut(line))

    def _column(self, number: int, column: int) -> int:
        """The column in the file, counted from 1, of one in the line as it is read."""
        return raw_column(self._raw[number], column) + 1


def _at_raw(number: int, column: int, line: str, message: str) -> ModelfileProblem:
    return ModelfileProblem(number + 1, column + 1, message, cut(line))


def _needs_value(name: str) -> str:
    if name in ("FROM", "PARAMETER", "QUANTIZE", "REQUIRES"):
        return f"{name} needs a value"
    return f'{name} needs a value; write "" for an empty one'


def _not_text(char: str) -> str:
    return f"U+{ord(char):04X} does not occur in text; a Modelfile is UTF-8, or UTF-16 with a byte order mark"
