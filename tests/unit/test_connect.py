"""Opening connections: cancellable in every phase, and never to a place that is off limits."""

from __future__ import annotations

import socket
import threading

import pytest

from lmd.registry.addresses import AddressRefused, Zone
from lmd.registry.cancel import CancelScope
from lmd.registry.connect import TransportFailed, open_socket
from lmd.registry.errors import PullCancelled


def connect(host: str, port: int, cancel: CancelScope, min_zone: Zone = Zone.LOOPBACK) -> socket.socket:
    sock, _ = open_socket(
        ("http", host, port),
        proxy=None,
        tls=None,
        connect_timeout_s=600.0,
        read_timeout_s=600.0,
        min_zone=min_zone,
        cancel=cancel,
    )
    return sock


def test_a_connect_that_gets_no_answer_is_cancelled() -> None:
    """A full backlog makes the kernel drop SYNs: the client waits in connect()."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = server.getsockname()[1]
        fillers = []
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        event = threading.Event()
        timer = threading.Timer(0.05, event.set)
        try:
            timer.start()
            with CancelScope(event) as cancel, pytest.raises(PullCancelled):
                connect("127.0.0.1", port, cancel)
        finally:
            timer.join()
            for filler in fillers:
                filler.close()


def test_a_read_that_gets_nothing_is_cancelled() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        event = threading.Event()
        with CancelScope(event) as cancel:
            sock = connect("127.0.0.1", server.getsockname()[1], cancel)
            with sock:
                timer = threading.Timer(0.05, event.set)
                timer.start()
                assert sock.recv(1) == b""
                timer.join()
                with pytest.raises(PullCancelled):
                    cancel.check()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with CancelScope(threading.Event()) as cancel, pytest.raises(TransportFailed, match="cannot connect"):
        connect("127.0.0.1", port, cancel)


def test_inwards_is_refused() -> None:
    with CancelScope(threading.Event()) as cancel, pytest.raises(AddressRefused, match="inwards"):
        connect("127.0.0.1", 1, cancel, min_zone=Zone.PRIVATE)
    with CancelScope(threading.Event()) as cancel, pytest.raises(AddressRefused, match="metadata"):
        connect("169.254.169.254", 80, cancel)


def test_names_are_judged_by_their_addresses() -> None:
    with CancelScope(threading.Event()) as cancel, pytest.raises(AddressRefused, match="inwards"):
        connect("localhost", 1, cancel, min_zone=Zone.PRIVATE)


def test_a_name_that_does_not_resolve() -> None:
    """Too long for a label, so that no resolver is asked."""
    with CancelScope(threading.Event()) as cancel, pytest.raises(TransportFailed, match="does not resolve"):
        connect("x" * 64 + ".example", 80, cancel)
