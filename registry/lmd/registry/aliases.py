"""Short names for repositories of the Hub: `llama3` stands for `hf.co/bartowski/Meta-Llama-3-8B-Instruct-GGUF`."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from lmd.registry.errors import InvalidRef, InvalidRequest
from lmd.registry.ref import DEFAULT_TAG, HubRef, NameRef, parse_ref

MAX_FILE_BYTES = 1024**2
_DEFAULT_KEY = "default"
# What follows the tag in `llama3:8b-q8_0`.
_QUANT = re.compile(r"(?:ud-)?(?:[it]?q\d[a-z0-9_]*|bf16|fp?16|fp?32|mxfp4[a-z0-9_]*|nvfp4)")


@dataclass(frozen=True, slots=True)
class Alias:
    """One short name: its repositories by tag, and the tag that is meant without one."""

    repositories: Mapping[str, HubRef]
    default_tag: str


class AliasTable:
    """The short names that are known. Immutable, so safe to share between threads."""

    def __init__(self, aliases: Mapping[str, Alias]) -> None:
        self._aliases = dict(sorted(aliases.items()))

    @classmethod
    def load(cls, user_file: Path | None = None) -> AliasTable:
        """Read the packaged table and, over it, *user_file*, a file of the same format; it need not exist.

        Raises:
            InvalidRequest: when the file cannot be read or is not well-formed, naming file and line.
        """
        packaged = resources.files("lmd.registry").joinpath("aliases.toml").read_text("utf-8")
        aliases = _AliasFile(packaged, "aliases.toml").parse()
        if user_file is not None:
            aliases |= _AliasFile(_read(user_file), str(user_file)).parse()
        return cls({name: alias for name, alias in aliases.items() if alias.repositories})

    @property
    def names(self) -> tuple[str, ...]:
        """All short names, sorted, without tags."""
        return tuple(self._aliases)

    def tags(self, name: str) -> tuple[str, ...]:
        """The tags of a short name, the default first; none for an unknown name."""
        alias = self._aliases.get(name)
        if alias is None:
            return ()
        return (alias.default_tag, *(tag for tag in alias.repositories if tag != alias.default_tag))

    def resolve(self, ref: NameRef) -> HubRef | None:
        """The repository that *ref* stands for; None when it is no short name of the table.

        A quantization may follow the tag or take its place: ``llama3:8b-q8_0``, ``llama3:q8_0``. The digest that *ref*
        asserts is handed on.
        """
        alias = self._aliases.get(ref.model)
        if alias is None:
            return None
        tag = alias.default_tag if ref.tag == DEFAULT_TAG else ref.tag
        if tag in alias.repositories:
            return replace(alias.repositories[tag], digest=ref.digest)
        for known in sorted(alias.repositories, key=len, reverse=True):
            if tag.startswith(f"{known}-") and _QUANT.fullmatch(tag, len(known) + 1):
                quant = tag[len(known) + 1 :]
                return replace(alias.repositories[known], selector=quant.upper(), digest=ref.digest)
        if _QUANT.fullmatch(tag):
            return replace(alias.repositories[alias.default_tag], selector=tag.upper(), digest=ref.digest)
        return None

    def suggest(self, text: str, n: int = 3, extra: Iterable[str] = ()) -> list[str]:
        """Up to *n* names close to *text*, best first: short names, their tags, and the names in *extra*.

        The tag ``latest`` is left out of what is compared and returned.
        """
        wanted = _without_default_tag(text.lower())
        known = {_without_default_tag(name): None for name in extra}
        known.update(dict.fromkeys(self._aliases))
        name, colon, _ = wanted.partition(":")
        if colon and name in self._aliases:
            # The name is right and the tag is not: the tags there are help most, however different they look.
            tags = [f"{name}:{tag}" for tag in self.tags(name) if tag != DEFAULT_TAG]
            return difflib.get_close_matches(wanted, tags, n, cutoff=0.0) or [name]
        by_lower = {candidate.lower(): candidate for candidate in known}
        close = difflib.get_close_matches(wanted[:200], by_lower, n, cutoff=0.6)
        return [by_lower[match] for match in close]


def _without_default_tag(name: str) -> str:
    return name.removesuffix(f":{DEFAULT_TAG}")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", field="aliases_file") from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(f"{path} is larger than {MAX_FILE_BYTES} bytes", field="aliases_file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidRequest(f"{path}:{line}: this is not UTF-8", field="aliases_file") from None


class _AliasFile:
    """The text of one file of short names, for errors that name file and line."""

    def __init__(self, text: str, origin: str) -> None:
        self._text = text
        self._origin = origin

    def parse(self) -> dict[str, Alias]:
        """Read all tables. Raises InvalidRequest."""
        try:
            document = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            where = re.search(r"\(at line (\d+), column (\d+)\)$", str(error))
            line = int(where[1]) if where else self._text.count("\n") + 1
            reason = re.sub(r" \(at .*\)$", "", str(error))
            raise self._error(line, reason[:1].lower() + reason[1:], "quote names that have dots") from None
        return {name.lower(): self._alias(name, table) for name, table in document.items()}

    def _alias(self, name: str, table: object) -> Alias:
        line = self._line_of(name)
        if not isinstance(table, dict):
            raise self._error(line, f"`{name}` must be a table", f'such as [{name}], then latest = "hf.co/org/repo"')
        self._check(f"{name}:{DEFAULT_TAG}", f"`{name}` is not a short name", line)
        repositories = {
            tag.lower(): self._repository(name, tag, target) for tag, target in table.items() if tag != _DEFAULT_KEY
        }
        default = table.get(_DEFAULT_KEY)
        if default is None and len(repositories) <= 1:
            return Alias(repositories, next(iter(repositories), DEFAULT_TAG))
        if not isinstance(default, str) or default.lower() not in repositories:
            line = self._line_of(name, _DEFAULT_KEY) if default is not None else line
            raise self._error(line, f"`default` of `{name}` must be one of its tags: {', '.join(repositories)}")
        return Alias(repositories, default.lower())

    def _repository(self, name: str, tag: str, target: object) -> HubRef:
        line = self._line_of(name, tag)
        if isinstance(target, dict):
            raise self._error(line, f"`{name}.{tag}` is a table in a table", f'quote the name: ["{name}.{tag}"]')
        self._check(f"x:{tag}", f"`{tag}` is not a tag", line)
        ref = _parse_target(target) if isinstance(target, str) else None
        if ref is None:
            raise self._error(line, f"`{tag}` of `{name}` must name a repository", 'such as "hf.co/org/repo"')
        return ref

    def _check(self, ref: str, why: str, line: int) -> None:
        try:
            parse_ref(ref)
        except InvalidRef as error:
            raise self._error(line, why, error.message) from None

    def _line_of(self, name: str, key: str = "") -> int:
        """The line of a table, or of a key in it; that of the table, or 1, when it is written in some other way."""
        lines = self._text.split("\n")
        header = re.compile(rf"""\s*(?:\[\s*)?["']?{re.escape(name)}["']?\s*[\]=.]""")
        start = next((number for number, line in enumerate(lines, 1) if header.match(line)), 1)
        entry = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""")
        if not key:
            return start
        return next((number for number, line in enumerate(lines[start:], start + 1) if entry.match(line)), start)

    def _error(self, line: int, why: str, hint: str = "") -> InvalidRequest:
        return InvalidRequest(f"{self._origin}:{line}: {why}", field="aliases_file", hint=hint)


def _parse_target(text: str) -> HubRef | None:
    """Parse what a short name stands for; None when it is not a repository of the Hub."""
    try:
        ref = parse_ref(text)
    except InvalidRef:
        return None
    return ref if isinstance(ref, HubRef) else None
