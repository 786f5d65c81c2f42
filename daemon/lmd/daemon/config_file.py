"""Reads the configuration: defaults, then the TOML file, then the environment; every mistake is told at once."""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from lmd.daemon.config import SECTIONS, Config, describe, settable_keys
from lmd.daemon.http.tokens import TokensUnusable, read_tokens
from lmd.daemon.places import resolve_dirs

#: Far above any sensible file; finding the line of a key takes quadratic time.
MAX_FILE_BYTES = 64 * 1024
MAX_TOKEN_BYTES = 1024

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One mistake: *where* it is (file and line, or a variable), and what is wrong."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class ConfigError(Exception):
    """Raised when the configuration cannot be used; *problems* holds every mistake that was found."""

    def __init__(self, problems: list[ConfigProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


def load_config(
    env: Mapping[str, str],
    *,
    uid: int,
    user_home: Path,
    config_file: Path | None = None,
    home: Path | None = None,
) -> Config:
    """Put the configuration together.

    *config_file* and *home* come from the command line and win over `LMD_CONFIG` and `LMD_HOME`. A file that was
    named must exist; the default one need not.

    Raises:
        ConfigError: with every problem found.
    """
    if home is None and env.get("LMD_HOME"):
        home = Path(env["LMD_HOME"])
    dirs = resolve_dirs(env, uid=uid, user_home=user_home, home=home.absolute() if home else None)
    file, document = _read_file(env, config_file, dirs.config / "config.toml")
    text = document if document is not None else ""
    raw = _parse(file, text)

    problems = _check_keys(file, text, raw)
    origins = {key: _Origin(file, text) for key in _keys_of(raw)}
    problems += _apply_environment(env, raw, origins)
    raw.setdefault("server", {}).setdefault("socket", dirs.runtime / "lmd.sock")
    raw.setdefault("store", {}).setdefault("path", dirs.state / "store")
    raw.setdefault("dropin", {}).setdefault("path", dirs.state / "dropin")
    aliases_file = dirs.config / "aliases.toml"
    if "aliases_file" not in raw and aliases_file.is_file():
        raw["aliases_file"] = aliases_file
    if problems:
        raise ConfigError(problems)

    sections = {name: raw.get(name, {}) for name in SECTIONS}
    whole = sections | {
        "aliases_file": raw.get("aliases_file"),
        "dirs": dirs,
        "file": file if document is not None else None,
    }
    try:
        config = Config.model_validate(whole, context={"user_home": str(user_home)})
    except ValidationError as error:
        order = list(origins)  # as they stand in the file, then the variables
        found = sorted(error.errors(), key=lambda problem: order.index(_key_of(problem)))
        raise ConfigError([_explain(problem, origins) for problem in found]) from None
    if config.aliases_file is not None and not config.aliases_file.is_file():
        raise ConfigError([_at(("aliases_file",), origins, f"{config.aliases_file} is not a file")])
    if config.http.tokens_file is not None:
        try:
            read_tokens(config.http.tokens_file)
        except TokensUnusable as error:
            hint = f"; {error.hint}" if error.hint else ""
            raise ConfigError([_at(("http", "tokens_file"), origins, f"{error.message}{hint}")]) from None
    token = _token(env, config.pull.token_file, origins)
    pull = config.pull.model_copy(update={"token": token, "proxies": _proxies(env)})
    return config.model_copy(update={"pull": pull})


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a value was written: a variable, or a file with its text."""

    source: Path | str
    text: str = ""

    def place(self, key: Key) -> str:
        if isinstance(self.source, str):
            return f"environment variable {self.source}"
        return f"{self.source}, line {line_of(self.text, key)}"


def line_of(text: str, key: Key) -> int:
    """Return the line, from 1, on which *key* is set in the TOML document *text*.

    The TOML parser of the standard library keeps no positions, so the document is parsed again line by line until
    the key appears. A value over several lines counts as its first one.
    """
    lines = text.splitlines()
    last_complete = 0
    for count in range(1, len(lines) + 1):
        try:
            found: Any = tomllib.loads("\n".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue
        for part in key:
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            return last_complete + 1
        last_complete = count
    return 1


def _read_file(env: Mapping[str, str], option: Path | None, default: Path) -> tuple[Path, str | None]:
    named = option or (Path(env["LMD_CONFIG"]) if env.get("LMD_CONFIG") else None)
    file = (named or default).absolute()
    try:
        with file.open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ConfigError([ConfigProblem(str(file), "not a regular file")])
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if named is None:
            return file, None
        raise ConfigError([ConfigProblem(str(file), "there is no such file")]) from None
    except OSError as error:
        raise ConfigError([ConfigProblem(str(file), f"cannot be read: {error.strerror}")]) from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError([ConfigProblem(str(file), f"larger than {MAX_FILE_BYTES} bytes")])
    try:
        return file, content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([ConfigProblem(f"{file}, line {line}", "not UTF-8")]) from None


def _parse(file: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
        if match is None:
            raise ConfigError([ConfigProblem(str(file), str(error))]) from None
        line = match[2] or str(len(text.splitlines()))
        raise ConfigError([ConfigProblem(f"{file}, line {line}", f"not TOML: {match[1]}")]) from None


def _keys_of(raw: Mapping[str, Any]) -> list[Key]:
    keys: list[Key] = []
    for name, value in raw.items():
        keys += [(name, key) for key in value] if isinstance(value, dict) else [(name,)]
    return keys


def _check_keys(file: Path, text: str, raw: Mapping[str, Any]) -> list[ConfigProblem]:
    legal = settable_keys()
    problems = []
    for name, value in raw.items():
        if name in SECTIONS and not isinstance(value, dict):
            where = _Origin(file, text).place((name,))
            problems.append(ConfigProblem(where, f"`{name}` is a table: write [{name}]"))
    for key in _keys_of(raw):
        if key in legal or (len(key) == 1 and key[0] in SECTIONS):
            continue
        where = _Origin(file, text).place(key if key[0] in SECTIONS else key[:1])
        if key == ("pull", "token"):
            message = "a token does not belong into this file; use HF_TOKEN, `pull.token_file` or a systemd credential"
        elif len(key) == 2 and key[0] not in SECTIONS:
            message = f"unknown table [{key[0]}]{_close(key[0], list(SECTIONS))}"
        else:
            siblings = [".".join(k) for k in legal if len(key) == 1 or k[0] == key[0]]
            message = f"unknown key `{'.'.join(key)}`{_close('.'.join(key), siblings)}"
        problem = ConfigProblem(where, message)
        if all(known.message != message for known in problems):
            problems.append(problem)
    return problems


def _close(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=2, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(f'`{name}`' for name in near)}?"
    return f"; known: {', '.join(f'`{name}`' for name in choices)}"


def _apply_environment(env: Mapping[str, str], raw: dict[str, Any], origins: dict[Key, _Origin]) -> list[ConfigProblem]:
    """Let variables override the file; an empty variable counts as unset."""
    by_variable: dict[str, Key] = {"HF_ENDPOINT": ("pull", "endpoint"), "LMD_SOCKET": ("server", "socket")}
    # Later entries win, so the specific name beats the shared one.
    by_variable |= {variable_of(key): key for key in settable_keys()}
    for variable, key in by_variable.items():
        if not env.get(variable):
            continue
        table = raw if len(key) == 1 else raw.setdefault(key[0], {})
        if isinstance(table, dict):
            table[key[-1]] = _from_text(key, env[variable])
            origins[key] = _Origin(variable)
    prefixes = tuple(f"LMD_{section.upper()}_" for section in SECTIONS)
    return [
        ConfigProblem(f"environment variable {name}", f"unknown setting{_close(name, sorted(by_variable))}")
        for name in sorted(env)
        if name.startswith(prefixes) and name not in by_variable
    ]


def variable_of(key: Key) -> str:
    """Return the environment variable that overrides *key*."""
    return "_".join(("LMD", *key)).upper()


def _from_text(key: Key, text: str) -> object:
    """Give a variable's text the type that TOML would have given it; what does not fit stays text and is refused."""
    annotation = Config.model_fields[key[0]].annotation if len(key) == 1 else None
    if len(key) == 2:
        annotation = SECTIONS[key[0]].model_fields[key[1]].annotation
    if annotation is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    if annotation is int and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    return text


def _at(key: Key, origins: Mapping[Key, _Origin], message: str) -> ConfigProblem:
    origin = origins.get(key)
    return ConfigProblem(origin.place(key) if origin else "default", message)


def _key_of(problem: Any) -> Key:
    return tuple(str(part) for part in problem["loc"][:2])


def _explain(problem: Any, origins: Mapping[Key, _Origin]) -> ConfigProblem:
    key = _key_of(problem)
    why = problem["ctx"]["error"] if problem["type"] == "value_error" else problem["msg"]
    _, legal, _ = describe(key)
    value = problem["input"]
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    shown = re.sub(r"//[^/]*@", "//***@", shown)
    return _at(key, origins, f"`{'.'.join(key)}` = {shown}: {why}; legal is {legal}")


def _proxies(env: Mapping[str, str]) -> dict[str, str]:
    """Return the proxies that every program on the machine is told to use; the lower-case name wins, as in curl."""
    found = {}
    for scheme in ("http", "https", "all", "no"):
        value = env.get(f"{scheme}_proxy") or env.get(f"{scheme}_proxy".upper())
        if value:
            found[scheme] = value
    return found


def _token(env: Mapping[str, str], token_file: Path | None, origins: Mapping[Key, _Origin]) -> SecretStr | None:
    """Find the Hub token: `HF_TOKEN`, then the systemd credential `hf_token`, then the configured file."""
    if env.get("HF_TOKEN"):
        return _checked_token(env["HF_TOKEN"], "environment variable HF_TOKEN")
    credentials = env.get("CREDENTIALS_DIRECTORY")
    if credentials and (credential := Path(credentials) / "hf_token").is_file():
        return _checked_token(_read_token(credential), str(credential))
    if token_file is None:
        return None
    content = _read_token(token_file)
    if token_file.stat().st_mode & 0o077:
        message = f"{token_file} can be read by others; run `chmod 600 {token_file}`"
        raise ConfigError([_at(("pull", "token_file"), origins, message)])
    return _checked_token(content, str(token_file))


def _read_token(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_TOKEN_BYTES + 1).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not ASCII text"
        raise ConfigError([ConfigProblem(str(file), f"no token can be read from it: {why}")]) from None


def _checked_token(text: str, where: str) -> SecretStr:
    """Refuse what cannot be a header value; the message never shows the token."""
    text = text.strip()
    if not re.fullmatch(r"[!-~]{1,1024}", text):
        raise ConfigError([ConfigProblem(where, "not a token: expected one word of printable ASCII")])
    return SecretStr(text)
