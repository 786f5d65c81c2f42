"""The settings of the HTTP gateway."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import BeforeValidator

from lmd.daemon.config_fields import ABSOLUTE_PATH, TRUTH, AnyPath, Section, SizeBytes, duration_between, setting
from lmd.daemon.quantities import SIZE_FORM

DEFAULT_PORT = 11434

_PORT = re.compile(r"[0-9]{1,5}")
_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\]")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\*|[^\s/?#*]+)")


@dataclass(frozen=True, slots=True)
class Address:
    """Where the gateway listens; port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.host).is_loopback

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "127.0.0.1:11434", "[::1]:11434" or an address without a port.

        Raises:
            ValueError: with what is wrong.
        """
        bracketed = re.fullmatch(r"\[([^]]*)\](?::(.*))?", text)
        if bracketed:
            host, port = bracketed[1], bracketed[2]
        elif text.count(":") > 1:
            host, port = text, None
        else:
            host, colon, rest = text.partition(":")
            port = rest if colon else None
        if port is not None and not (_PORT.fullmatch(port) and int(port) <= 65535):
            raise ValueError(f"{port!r} is no port")
        host = {"localhost": "127.0.0.1", "*": "0.0.0.0"}.get(host, host)  # noqa: S104 - what the user wrote
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"{host!r} is no IP address; names are not looked up") from None
        return cls(host, DEFAULT_PORT if port is None else int(port))


def check_addresses(value: object) -> tuple[str, ...]:
    """Read where to listen: a list, or text with several addresses."""
    addresses = [Address.parse(word) for word in _words(value)]
    if not addresses:
        raise ValueError("no address is named; `http.enabled = false` switches the gateway off")
    return tuple(map(str, addresses))


def check_origins(value: object) -> tuple[str, ...]:
    """Read origins of web pages; `scheme://*` stands for all of a scheme that is not the web's."""
    origins = _words(value)
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is no origin such as https://chat.example.org")
        if origin in ("http://*", "https://*"):
            raise ValueError(f"{origin} would let every web page use the models")
    return tuple(origin.rstrip("/") for origin in origins)


def check_hosts(value: object) -> tuple[str, ...]:
    """Read names of this machine; `*.example.org` stands for all names below one."""
    hosts = [host.lower() for host in _words(value)]
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ValueError(f"{host!r} is no host name; write it without scheme and port")
    return tuple(hosts)


def _words(value: object) -> list[str]:
    if isinstance(value, str):
        words = value.replace(",", " ").split()
        if not words:
            raise ValueError("there is nothing in it")
        return words
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError("not a list of texts")
    return list(value)


_header, HEADER = duration_between("1s", "10m")
_body, BODY = duration_between("1s", "1h")
_idle, IDLE = duration_between("1s", "1d")
_write, WRITE = duration_between("1s", "1h")

_LISTS = "in the variable, words with spaces or commas between them"


class HttpConfig(Section):
    """The HTTP gateway: what Ollama, OpenAI and Anthropic clients talk to."""

    enabled: bool = setting(True, "Whether the gateway is there.", TRUTH)
    listen: Annotated[tuple[str, ...], BeforeValidator(check_addresses)] = setting(
        (f"127.0.0.1:{DEFAULT_PORT}",),
        "Where it listens. Port 0 is any free one; `lm status` tells which. When an address is taken the daemon runs "
        "without it, and says so there. Whoever comes over another interface than the loopback needs a token.",
        f'a list such as ["127.0.0.1:11434", "[::1]:11434"]; {_LISTS}',
    )
    allowed_origins: Annotated[tuple[str, ...], BeforeValidator(check_origins)] = setting(
        (),
        "Web pages that may use the models, beside those of this machine (`http://localhost:3000` and the like) and of "
        "desktop applications (`app://`, `tauri://`, `vscode-webview://`).",
        f'a list such as ["https://chat.example.org", "chrome-extension://*"]; {_LISTS}',
    )
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(check_hosts)] = setting(
        (),
        "More names under which this machine may be asked over the loopback interface, beside `localhost`, its own "
        "host name and loopback addresses: those of a reverse proxy. Any other name is refused, because a web page can "
        "make its own name point here.",
        f'a list such as ["models.example.org", "*.internal"]; {_LISTS}',
    )
    tokens_file: AnyPath | None = setting(
        None,
        "A file with the SHA-256 of tokens, readable by the daemon's user alone: on each line a name and "
        "`sha256:` with 64 hexadecimal digits. Who sends such a token is the caller `token:NAME`. It is read again "
        "when it changes.",
        ABSOLUTE_PATH,
        shown="none",
    )
    users: Literal["socket", "all"] = setting(
        "socket",
        'Which users of this machine are served without a token: "socket" are those who may connect to the daemon\'s '
        'socket, "all" is everybody.',
        '"socket" or "all"',
    )
    require_token: bool = setting(
        False, "Whether users of this machine need a token too, instead of being known by their user id.", TRUTH
    )
    max_body_bytes: SizeBytes = setting(
        64 << 20,
        "The largest body of a request, except for the bytes of a blob.",
        f"{SIZE_FORM}, from 1KiB to 1GiB",
        shown='"64MiB"',
        ge=1024,
        le=1 << 30,
    )
    header_timeout: Annotated[timedelta, _header] = setting(
        timedelta(seconds=10), "How long the headers of a request may take, from its first byte on.", HEADER
    )
    body_timeout: Annotated[timedelta, _body] = setting(
        timedelta(seconds=30), "How long a request may bring nothing before its body is whole.", BODY
    )
    idle_timeout: Annotated[timedelta, _idle] = setting(
        timedelta(seconds=90), "How long a connection may stay open without a request.", IDLE
    )
    slow_reader_timeout: Annotated[timedelta, _write] = setting(
        timedelta(seconds=60),
        "How long a client may leave its answer unread, once what is kept for it (64 KiB, and what the kernel holds) "
        "is full; then its connection is cut, and its request with it.",
        WRITE,
    )
    max_connections: int = setting(
        4096,
        "Connections that may be open at once; more are answered with status 503.",
        "a whole number from 1 to 65536",
        ge=1,
        le=65536,
    )
    max_connections_per_user: int = setting(
        1024,
        "Connections that one user of this machine, or everybody from elsewhere together, may have open at once.",
        "a whole number from 1 to 65536",
        ge=1,
        le=65536,
    )
