"""The daemon's settings: one frozen value, checked once at start.

The text of each field is also the reference documentation (`config_docs.py`), so it is written for people.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, Field, SecretStr

from lmd.daemon.config_fields import ABSOLUTE_PATH, TRUTH, AnyPath, Section, SizeBytes, duration_between, setting
from lmd.daemon.http.config import HttpConfig
from lmd.daemon.places import Dirs
from lmd.daemon.quantities import SIZE_FORM, format_duration
from lmd.registry.errors import InvalidRef
from lmd.registry.ref import parse_ref

LOOPBACK_NAMES = ("localhost", "::1")


def check_endpoint(value: object) -> str:
    """Read the address of a Hub: https, or http on this machine, where nobody in between can read the token."""
    if not isinstance(value, str):
        raise ValueError("not a URL")
    parts = urlsplit(value)
    host = parts.hostname or ""
    if parts.scheme not in ("https", "http") or not host or parts.query or parts.fragment:
        raise ValueError("not an http(s) URL")
    if parts.username is not None:
        raise ValueError("a URL with a user name or password in it ends up in logs; use HF_TOKEN")
    if parts.scheme == "http" and not (host in LOOPBACK_NAMES or host.startswith("127.")):
        raise ValueError("http without TLS is only for this machine")
    return value.rstrip("/")


def check_weights(value: object) -> dict[str, float]:
    """Read the shares of callers: a table, or, as in a variable, text such as "uid:1000=2 uid:1001=0.5"."""
    if isinstance(value, str):
        pairs = [word.partition("=") for word in value.replace(",", " ").split()]
        if not pairs:
            raise ValueError("no caller is named")
        value = {caller: _number(share) for caller, _, share in pairs}
    if not isinstance(value, dict):
        raise ValueError(f"shares are a table, not {type(value).__name__}")
    weights: dict[str, float] = {}
    for caller, weight in value.items():
        if not re.fullmatch(r"uid:(0|[1-9][0-9]{0,9})|token:[A-Za-z0-9_.-]{1,64}", str(caller)):
            raise ValueError(f"{caller!r} is no caller; write uid: and the number of a user, or token: and a name")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.01 <= weight <= 100:
            raise ValueError(f"the share of {caller} must be a number from 0.01 to 100, not {weight!r}")
        weights[caller] = float(weight)
    return weights


def check_names(value: object) -> tuple[str, ...]:
    """Read model references: a list, or as text one with commas."""
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("not a list of model references")
    for name in names:
        try:
            parse_ref(name)
        except InvalidRef as error:
            raise ValueError(f"{name!r} is no model reference: {error.message}") from None
    return tuple(names)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # refused with the caller's name


Endpoint = Annotated[str, BeforeValidator(check_endpoint)]
ModelNames = Annotated[tuple[str, ...], BeforeValidator(check_names)]
Weights = Annotated[dict[str, float], BeforeValidator(check_weights)]

_grace, GRACE = duration_between("0s", "365d")
_history, HISTORY = duration_between("0s", "365d")
_stall, STALL = duration_between("1s", "1h")
_keep, KEEP = duration_between("0s", "365d", for_ever=True)
_load, LOAD = duration_between("1s", "24h")
_drain, DRAIN = duration_between("0s", "1h")


class ServerConfig(Section):
    """How clients reach the daemon."""

    socket: AnyPath = setting(
        ...,
        "The public socket. Ignored under systemd socket activation, where the unit names it.",
        "an absolute path of at most 107 bytes",
        shown="`lmd.sock` in the runtime directory",
    )
    max_connections_per_user: int = setting(
        64,
        "Connections that one user may have open at once; more are closed at once.",
        "a whole number from 1 to 4096",
        ge=1,
        le=4096,
    )


class StoreConfig(Section):
    """Where models are kept."""

    path: AnyPath = setting(..., "The directory of the store.", ABSOLUTE_PATH, shown="`store` in the state directory")
    grace_period: Annotated[timedelta, _grace] = setting(
        timedelta(hours=1), "How long garbage collection spares what nothing refers to.", GRACE
    )
    history: Annotated[timedelta, _history] = setting(
        timedelta(days=7),
        "How long garbage collection spares an earlier version of a model after another one took its place, so that "
        "`lm rollback` can go back to it. A version whose weights the current one shares needs kilobytes; one with "
        "weights of its own needs their space. Removing a model removes its versions.",
        HISTORY,
    )


class PullConfig(Section):
    """How models arrive."""

    endpoint: Endpoint = setting(
        "https://huggingface.co",
        "The Hub that models are pulled from. `HF_ENDPOINT` overrides it.",
        "an https URL, or an http URL on this machine",
    )
    connections: int = setting(
        4, "Ranges of one large file that are fetched at the same time.", "a whole number from 1 to 16", ge=1, le=16
    )
    stall_timeout: Annotated[timedelta, _stall] = setting(
        timedelta(seconds=30), "A connection that delivers nothing for so long is given up and retried.", STALL
    )
    token_file: AnyPath | None = setting(
        None,
        "A file that holds the Hub token, readable by the daemon's user alone. `HF_TOKEN` and the systemd credential "
        "`hf_token` come first. The token itself cannot be written here.",
        ABSOLUTE_PATH,
        shown="none",
    )
    token: SecretStr | None = Field(default=None, exclude=True, repr=False)
    #: Scheme ("http", "https", "all") → proxy URL, which may hold a password; "no" → hosts without a proxy.
    proxies: dict[str, str] = Field(default_factory=dict, exclude=True, repr=False)


class RuntimeConfig(Section):
    """How models are loaded and served."""

    keep_alive: Annotated[timedelta, _keep] = setting(
        timedelta(minutes=5), "How long a model stays loaded after its last use.", KEEP
    )
    slots: int = setting(
        4, "Requests that one model answers at the same time.", "a whole number from 1 to 64", ge=1, le=64
    )
    num_ctx: int = setting(
        4096,
        "Tokens of context for each request, unless the model or the request says otherwise.",
        "a whole number from 16 to 16777216",
        ge=16,
        le=16_777_216,
    )
    min_ctx: int = setting(
        2048,
        "The smallest context that a model is loaded with when `num_ctx` tokens do not fit. A context that the model "
        "or the request asks for by name is never made smaller; nor is any when this is not below `num_ctx`.",
        "a whole number from 16 to 16777216",
        ge=16,
        le=16_777_216,
    )
    preload: ModelNames = setting(
        (),
        "Models that are loaded when the daemon starts, one after the other and without holding up anybody. They leave "
        "memory like others; `lm pin` keeps them there.",
        'a list of model references, such as ["llama3.2", "nomic-embed-text"]; in the variable, separated by commas',
    )
    spare_runner: bool = setting(
        True,
        "Keep a runner without a model ready once a model has been loaded, so that the next load does not wait for a "
        "process to start. It takes some tens of megabytes, and is not started when memory is short.",
        TRUTH,
    )
    kv_type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = setting(
        "f16",
        "How keys and values of the context are kept, unless the model or the request says otherwise. q8_0 takes half "
        "the memory of f16 and q4_0 a quarter, for less exact answers. Models for which the engine cannot do that keep "
        "them in f16.",
        '"f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1" or "q4_0"',
    )
    load_timeout: Annotated[timedelta, _load] = setting(
        timedelta(minutes=5), "A load that makes no progress for so long is ended.", LOAD
    )
    drain_timeout: Annotated[timedelta, _drain] = setting(
        timedelta(seconds=30), "How long running answers may go on when the daemon is told to stop.", DRAIN
    )
    max_queue: int = setting(
        512,
        "Requests that may wait for one model; more are refused. One caller may fill three quarters of the queue, so "
        "that there is always room for others.",
        "a whole number from 1 to 65536",
        ge=1,
        le=65536,
    )
    caller_weights: Weights = setting(
        {},
        "How large a caller's share is when several want the same model at once: with 2.0 it gets twice the tokens of "
        "one with 1.0, which is the share of everybody who is not named. It changes nothing for a caller who is alone.",
        'a table of numbers from 0.01 to 100, such as { "uid:1000" = 2.0 }; in the variable, "uid:1000=2 uid:1001=0.5"',
    )
    memory_reserve_bytes: SizeBytes = setting(
        512 << 20,
        "Memory of each device that models leave free for everything else.",
        f"{SIZE_FORM}, up to 1TiB",
        shown='"512MiB"',
        ge=0,
        le=1 << 40,
    )
    require_gpu: bool = setting(
        False,
        "Refuse a model with `DEVICE_UNAVAILABLE` when no accelerator can be used for it, instead of loading it in "
        "main memory; what does not fit on accelerators as a whole is refused with `DEVICE_MEMORY`. Models and "
        "requests that set `num_gpu 0` go to main memory all the same.",
        TRUTH,
    )
    kv_ram_bytes: SizeBytes = setting(
        1 << 30,
        "RAM that each model may take for what it has read and nobody is using now, beside the memory of its context "
        "and never more than that. It keeps long conversations at hand without slowing those that run. 0 keeps none.",
        f"{SIZE_FORM}, up to 16TiB",
        shown='"1GiB"',
        ge=0,
        le=16 << 40,
    )
    kv_disk_bytes: SizeBytes = setting(
        4 << 30,
        "Disk space for saved KV: what models have read is kept when they are unloaded, so that it need not be read "
        "again. It holds the text of prompts and answers, readable by the daemon's user alone. 0 keeps none.",
        f"{SIZE_FORM}, up to 16TiB",
        shown='"4GiB"',
        ge=0,
        le=16 << 40,
    )


class DropinConfig(Section):
    """The folder whose files become models."""

    enabled: bool = setting(True, "Whether the folder is watched.", TRUTH)
    path: AnyPath = setting(
        ...,
        "The folder. A GGUF file or Modelfile put there becomes a model; removing it removes the model.",
        ABSOLUTE_PATH,
        shown="`dropin` in the state directory",
    )


class LogConfig(Section):
    """What the daemon tells about itself."""

    level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "The least important events that are logged.", '"debug", "info", "warning" or "error"'
    )
    format: Literal["auto", "console", "json", "journal"] = setting(
        "auto",
        'How events are written. "auto" is "console" on a terminal, "journal" under systemd, "json" elsewhere.',
        '"auto", "console", "json" or "journal"',
    )
    file: AnyPath | None = setting(
        None,
        "A file to log to instead of standard error; rotated at 10 MiB, three old ones are kept. "
        "When standard error is the null device, `lmd.log` in the log directory is used without asking.",
        ABSOLUTE_PATH,
        shown="standard error",
    )


class Config(Section):
    """Everything that steers the daemon."""

    server: ServerConfig
    store: StoreConfig
    pull: PullConfig
    runtime: RuntimeConfig
    dropin: DropinConfig
    http: HttpConfig
    log: LogConfig
    aliases_file: AnyPath | None = setting(
        None,
        "More short names for models, in the format of the built-in list.",
        ABSOLUTE_PATH,
        shown="`aliases.toml` in the configuration directory, when it exists",
    )
    dirs: Dirs
    #: The configuration file that was read, if any.
    file: Path | None = None


#: Section name → its class, in the order of the documentation.
SECTIONS: dict[str, type[Section]] = {
    "server": ServerConfig,
    "store": StoreConfig,
    "pull": PullConfig,
    "runtime": RuntimeConfig,
    "dropin": DropinConfig,
    "http": HttpConfig,
    "log": LogConfig,
}

#: Fields that nobody writes in a file: secrets, and what every program on the machine shares.
_NOT_SETTABLE = {("pull", "token"), ("pull", "proxies")}


def settable_keys() -> list[tuple[str, ...]]:
    """Return the path of every key that a configuration file may hold, top level first."""
    keys: list[tuple[str, ...]] = [("aliases_file",)]
    for section, model in SECTIONS.items():
        keys += [(section, key) for key in model.model_fields if (section, key) not in _NOT_SETTABLE]
    return keys


def describe(key: tuple[str, ...]) -> tuple[str, str, str]:
    """Return what *key* does, what may be written, and its default as text."""
    model: type[BaseModel] = Config if len(key) == 1 else SECTIONS[key[0]]
    field = model.model_fields[key[-1]]
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    shown = extra.get("shown")
    return field.description or "", str(extra["legal"]), str(shown) if shown is not None else _toml(field.default)


def _toml(value: object) -> str:
    writers: dict[type, Callable[[Any], str]] = {
        bool: lambda truth: "true" if truth else "false",
        timedelta: lambda duration: f'"{format_duration(duration)}"',
        str: lambda text: f'"{text}"',
        tuple: lambda items: "[" + ", ".join(map(_toml, items)) + "]",
        dict: lambda table: (
            "{ " + ", ".join(f'"{key}" = {item}' for key, item in table.items()) + " }" if table else "{}"
        ),
    }
    return writers.get(type(value), str)(value)
