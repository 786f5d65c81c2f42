"""Opening guarded sockets: name resolution, address rules, proxies and TLS, all of it cancellable."""

from __future__ import annotations

import base64
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import unquote, urlsplit

from lmd.registry.addresses import AddressRefused, Origin, Zone, zone_of
from lmd.registry.cancel import CancelScope

#: As getaddrinfo returns it: the address family and what connect() takes.
_Address = tuple[socket.AddressFamily, tuple[str | int | bytes, ...]]

_MAX_PROXY_REPLY_BYTES = 16 << 10
_RESOLVE_POLL_S = 0.05


class TransportFailed(Exception):
    """Raised when a server cannot be reached or a connection breaks; the message says how.

    *permanent*: trying again cannot help, as with a certificate that is not trusted.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


def open_socket(
    origin: Origin,
    *,
    proxy: str | None,
    tls: ssl.SSLContext | None,
    connect_timeout_s: float,
    read_timeout_s: float,
    min_zone: Zone,
    cancel: CancelScope,
) -> tuple[socket.socket, Zone]:
    """Return a connected socket and the zone of what it is connected to; the socket is tied to *cancel*.

    Through a proxy only literal addresses can be judged, because the proxy resolves the names; a name counts as
    public then.

    Raises:
        AddressRefused: the address is off limits, or further inwards than *min_zone*.
        TransportFailed: no address of the host answers in time.
        PullCancelled: cancelled meanwhile.
    """
    _, host, port = origin
    if proxy is None:
        sock, zone = _connect(host, port, connect_timeout_s, min_zone, cancel)
    else:
        zone = _literal_zone(host)
        _require(zone, min_zone, host)
        parts = urlsplit(proxy)
        if parts.scheme != "http" or not parts.hostname:
            raise TransportFailed("only http:// proxies are supported", permanent=True)
        sock, _ = _connect(parts.hostname, parts.port or 3128, connect_timeout_s, Zone.LOOPBACK, cancel)
    try:
        if tls is not None:
            if proxy is not None:
                _tunnel(sock, host, port, proxy)
            sock = _wrap(sock, host, tls, cancel)
        sock.settimeout(read_timeout_s)
    except BaseException:
        cancel.discard(sock)
        sock.close()
        raise
    return sock, zone


def _connect(host: str, port: int, timeout_s: float, min_zone: Zone, cancel: CancelScope) -> tuple[socket.socket, Zone]:
    deadline = time.monotonic() + timeout_s
    failure = f"{host} has no address"
    for family, address in _resolve(host, port, deadline, cancel):
        zone = zone_of(str(address[0]))
        _require(zone, min_zone, host)
        cancel.check()
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            failure = f"{host} did not answer within {timeout_s:g} s"
            break
        sock = socket.socket(family, socket.SOCK_STREAM)
        cancel.add(sock)
        try:
            sock.settimeout(left_s)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            cancel.discard(sock)
            sock.close()
            cancel.check()
            late = isinstance(error, TimeoutError)
            failure = f"{host} did not answer within {timeout_s:g} s" if late else f"cannot connect to {host}: {error}"
        else:
            return sock, zone
    raise TransportFailed(failure)


def _resolve(host: str, port: int, deadline: float, cancel: CancelScope) -> list[_Address]:
    """Return the addresses of *host*. The resolver cannot be interrupted, so it runs in a thread that may be left."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        return [(family, (host, port))]
    found: list[_Address] = []
    failed: list[OSError] = []
    done = threading.Event()

    def look_up() -> None:
        try:
            for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                found.append((family, address))
        except (OSError, UnicodeError) as error:
            failed.append(error if isinstance(error, OSError) else OSError(str(error)))
        finally:
            done.set()

    threading.Thread(target=look_up, name="lmd-resolve", daemon=True).start()
    while not done.wait(_RESOLVE_POLL_S):
        cancel.check()
        if time.monotonic() > deadline:
            raise TransportFailed(f"the name {host} did not resolve in time")
    cancel.check()
    if failed:
        raise TransportFailed(f"the name {host} does not resolve: {failed[0].strerror or failed[0]}") from failed[0]
    return found


def _require(zone: Zone, min_zone: Zone, host: str) -> None:
    if zone < min_zone:
        raise AddressRefused(f"a redirect leads inwards, to the {zone.name.lower()} address of {host}")


def _literal_zone(host: str) -> Zone:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return Zone.LOOPBACK if host == "localhost" else Zone.PUBLIC
    return zone_of(host)


def _wrap(sock: socket.socket, host: str, tls: ssl.SSLContext, cancel: CancelScope) -> socket.socket:
    cancel.discard(sock)
    try:
        wrapped = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    except (OSError, ValueError) as error:
        raise TransportFailed(f"TLS with {host} failed: {error}") from error
    cancel.add(wrapped)
    try:
        wrapped.do_handshake()
    except OSError as error:
        cancel.discard(wrapped)
        wrapped.close()
        cancel.check()
        if isinstance(error, ssl.SSLCertVerificationError):
            raise TransportFailed(
                f"the certificate of {host} is not trusted: {error.verify_message}", permanent=True
            ) from error
        raise TransportFailed(f"TLS with {host} failed: {error}") from error
    return wrapped


def proxy_authorization(proxy: str) -> dict[str, str]:
    """Return the header that carries a proxy URL's user name and password; none when it has no user name."""
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _tunnel(sock: socket.socket, host: str, port: int, proxy: str) -> None:
    """Ask a proxy for a tunnel (RFC 9110, 9.3.6)."""
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    head = {"Host": name, **proxy_authorization(proxy)}
    lines = [f"CONNECT {name} HTTP/1.1", *(f"{key}: {value}" for key, value in head.items())]
    try:
        sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        reply = b""
        # Byte by byte at the end would be needed only if a proxy sent data before the client's hello; TLS does not.
        while b"\r\n\r\n" not in reply:
            data = sock.recv(4096)
            if not data or len(reply) > _MAX_PROXY_REPLY_BYTES:
                raise TransportFailed("the proxy did not open a tunnel")
            reply += data
    except OSError as error:
        raise TransportFailed(f"the proxy broke off: {error}") from error
    status = reply.split(b"\r\n", 1)[0].split(b" ", 2)
    if len(status) < 2 or not status[1].startswith(b"2"):
        shown = status[1].decode("latin-1")[:3] if len(status) > 1 else "no status"
        raise TransportFailed(f"the proxy refused a tunnel to {host} ({shown})", permanent=shown in ("403", "407"))
