"""The two sides of a splice, without sockets."""

from __future__ import annotations

from lmd.daemon.front import _Side


class Transport:
    """Remembers what is written; pausing has no effect, as in Python up to 3.11.3 when a connection was just made."""

    def __init__(self) -> None:
        self.written = b""
        self.reading = True

    def set_write_buffer_limits(self, high: int) -> None:
        """Nothing is buffered."""

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write(self, data: bytes) -> None:
        self.written += data


def test_what_comes_before_the_other_side_is_there_is_passed_on_then() -> None:
    """A gRPC server speaks first. With Python 3.11.2 its first bytes came before the client's side was there, and each
    connection ended in an AttributeError: `pause_reading` in `connection_made` has an effect from 3.11.4 on only.
    """
    client, server = _Side(may_half_close=True), _Side(may_half_close=False)
    client.other, server.other = server, client
    servers, clients = Transport(), Transport()
    server.connection_made(servers)  # type: ignore[arg-type]
    server.data_received(b"set")
    server.data_received(b"tings")
    client.connection_made(clients)  # type: ignore[arg-type]
    # The other side is there, but what came first has not been passed on yet.
    server.data_received(b" first")
    server.start()
    server.data_received(b", window")
    assert clients.written == b"settings first, window"
    assert servers.reading
