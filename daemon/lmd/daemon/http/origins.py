"""Which names a request may use for this machine, and which web pages may make one.

A browser sends requests for any page that it shows. Two things tell them apart from those of programs: the page's
`Origin`, and the name it asked for (`Host`), which is the page's own when that name was made to point here (DNS
rebinding).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

#: Origins of desktop applications: no web page can have one.
APPLICATION_SCHEMES = ("app", "file", "tauri", "vscode-file", "vscode-webview")

_PORT = re.compile(r"[0-9]{1,5}")
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?\.?")


class Hosts:
    """The names of this machine."""

    def __init__(self, own_name: str, allowed: Sequence[str]) -> None:
        own = own_name.lower()
        self._names = {"localhost", *(host for host in allowed if not host.startswith("*."))}
        if own:
            self._names |= {own, own.partition(".")[0]}
        # Nobody can register a name below .internal; containers call their host so.
        self._suffixes = (".localhost", ".internal", *(host[1:] for host in allowed if host.startswith("*.")))

    def allow(self, host: str) -> bool:
        """Tell whether a Host header names this machine."""
        name = host_of(host)
        if name is None:
            return False
        if name in self._names or name.endswith(self._suffixes):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # 0.0.0.0 reaches this machine, but a page could use it to get around the browser's own rules.
        return address.is_loopback


class Origins:
    """The pages that may use the models."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._origins = {origin for origin in allowed if not origin.endswith("://*")}
        self._schemes = {*APPLICATION_SCHEMES, *(o.partition(":")[0] for o in allowed if o.endswith("://*"))}

    def allow(self, origin: str, host: str) -> bool:
        """Tell whether a page of *origin* may ask; *host* is the name it asked for, itself allowed already."""
        if origin in self._origins:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
            return False
        if parts.scheme not in ("http", "https"):
            return parts.scheme in self._schemes
        name = host_of(parts.netloc)
        if name is None:
            return False
        # The machine's own pages: those of its other services, and those that are served under the name asked for.
        return _is_local(name) or parts.netloc.lower() == host.lower()


def host_of(netloc: str) -> str | None:
    """Return the lower-case name or address in "name", "name:port" or "[address]:port"; None when it is none."""
    text = netloc.lower()
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not (rest.startswith(":") and _PORT.fullmatch(rest[1:]))):
            return None
        try:
            return str(ipaddress.IPv6Address(name))
        except ValueError:
            return None
    name, colon, port = text.partition(":")
    if (colon and not _PORT.fullmatch(port)) or not _NAME.fullmatch(name):
        return None
    return name.removesuffix(".")


def _is_local(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost") or name == "0.0.0.0":  # noqa: S104 - what a browser sends
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
