"""Which URLs and addresses a pull may talk to.

A reference or a redirect must not turn the daemon into a way to reach what only the daemon can: the cloud's metadata
service, or services of the machine and its network. The rules: http and https only; never from https to http; never
a link-local, multicast or unspecified address; and a redirect never leads further inwards than where it came from
(public, then private, then loopback). Addresses are checked where the connection is made, after the name resolution
that is used, so that a name cannot be rebound in between.
"""

from __future__ import annotations

import ipaddress
from enum import IntEnum
from urllib.parse import SplitResult, urlsplit

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Metadata services outside the link-local ranges: AWS over IPv6, Alibaba Cloud, Oracle Cloud.
_METADATA = frozenset(ipaddress.ip_address(text) for text in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192"))

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Zone(IntEnum):
    """How far inside an address is; a higher value is further out."""

    LOOPBACK = 0
    PRIVATE = 1
    PUBLIC = 2


class AddressRefused(ValueError):
    """Raised for a URL or address that no pull may talk to; the message says why."""


def zone_of(address: str) -> Zone:
    """Return the zone of a literal address.

    Raises:
        AddressRefused: the address is link-local, multicast, unspecified or a metadata service.
    """
    ip: IpAddress = ipaddress.ip_address(address.split("%")[0])
    embedded = _embedded_ipv4(ip)
    if embedded is not None:
        ip = embedded
    if ip.is_link_local or ip in _METADATA:
        raise AddressRefused(f"{ip} is a link-local or metadata address")
    if ip.is_multicast or ip.is_unspecified:
        raise AddressRefused(f"{ip} is not the address of a server")
    if ip.is_loopback:
        return Zone.LOOPBACK
    return Zone.PUBLIC if ip.is_global else Zone.PRIVATE


def _embedded_ipv4(ip: IpAddress) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 one stands for: mapped, 6to4 or NAT64."""
    if not isinstance(ip, ipaddress.IPv6Address):
        return None
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip.sixtofour is not None:
        return ip.sixtofour
    if ip in ipaddress.ip_network("64:ff9b::/96"):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


def split_url(url: str) -> SplitResult:
    """Split an absolute http or https URL.

    Raises:
        AddressRefused: another scheme, no host, credentials in it, a bad port, or characters that URLs do not have.
    """
    if any(ord(char) <= 0x20 or ord(char) >= 0x7F or char == "\\" for char in url):
        raise AddressRefused("the URL holds characters that must be encoded")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AddressRefused(f"the URL does not parse: {error}") from error
    if parts.scheme not in _DEFAULT_PORTS:
        raise AddressRefused(f"the scheme {parts.scheme[:20] or '(none)'} is not http or https")
    if not parts.hostname or port == 0:
        raise AddressRefused("the URL names no host")
    if parts.username is not None or parts.password is not None:
        raise AddressRefused("the URL holds a user name or password")
    return parts


Origin = tuple[str, str, int]


def origin_of(url: str) -> Origin:
    """Return scheme, host and port of a URL, defaults filled in.

    Raises:
        AddressRefused: as `split_url`.
    """
    parts = split_url(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS[parts.scheme]


def without_secrets(url: str) -> str:
    """Return a URL that can be logged or shown: no query, fragment, user name or password."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(a malformed URL)"
    shown = f"[{host}]" if ":" in host else host
    text = f"{parts.scheme}://{shown}{port}{parts.path}" if host else f"{parts.scheme}:…"
    return "".join(char if 0x20 < ord(char) < 0x7F or char == "…" else "?" for char in text)[:300]
