"""Connections of the gateway: what is refused, what takes too long, and what is left when a client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import psutil
import pytest

from tests.support.http_gateway import Client, gateway
from tests.support.leaks import until

HOST = b"Host: localhost\r\n"

CHUNKED = b"POST /echo HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n"

SMUGGLED = {
    "length and chunks": b"POST /echo HTTP/1.1\r\n%bContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST /echo HTTP/1.1\r\n%bContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "the same length twice": b"POST /echo HTTP/1.1\r\n%bContent-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": b"POST /echo HTTP/1.1\r\n%bContent-Length: 4, 4\r\n\r\nabcd",
    "a signed length": b"POST /echo HTTP/1.1\r\n%bContent-Length: +4\r\n\r\nabcd",
    "a negative length": b"POST /echo HTTP/1.1\r\n%bContent-Length: -4\r\n\r\nabcd",
    "a hexadecimal length": b"POST /echo HTTP/1.1\r\n%bContent-Length: 0x4\r\n\r\nabcd",
    "an endless length": b"POST /echo HTTP/1.1\r\n%bContent-Length: 99999999999999999999999\r\n\r\nabcd",
    "a space before the colon": b"POST /echo HTTP/1.1\r\n%bContent-Length : 4\r\n\r\nabcd",
    "two encodings": CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and more": b"POST /echo HTTP/1.1\r\n%bTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "more and chunked": b"POST /echo HTTP/1.1\r\n%bTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "an odd encoding": b"POST /echo HTTP/1.1\r\n%bTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "an encoding behind a tab": b"POST /echo HTTP/1.1\r\n%bTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /echo HTTP/1.0\r\n%bTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare line feeds": b"GET /who HTTP/1.1\n%b\n",
    "a bare line feed": b"GET /who HTTP/1.1\r\n%bX: a\nY: b\r\n\r\n",
    "a bare carriage return": b"GET /who HTTP/1.1\r\n%bX: a\rY: b\r\n\r\n",
    "a folded header": b"GET /who HTTP/1.1\r\n%bX: a\r\n b\r\n\r\n",
    "a first header that is folded": b"GET /who HTTP/1.1\r\n X: a\r\n%b\r\n",
    "NUL in a value": b"GET /who HTTP/1.1\r\n%bX: a\0b\r\n\r\n",
    "NUL in a name": b"GET /who HTTP/1.1\r\n%bX\0Y: b\r\n\r\n",
    "a control character": b"GET /who HTTP/1.1\r\n%bX: a\x01b\r\n\r\n",
    "an empty name": b"GET /who HTTP/1.1\r\n%b: b\r\n\r\n",
    "no colon": b"GET /who HTTP/1.1\r\n%bnonsense\r\n\r\n",
    "a space in a name": b"GET /who HTTP/1.1\r\n%bX Y: b\r\n\r\n",
    "two hosts": b"GET /who HTTP/1.1\r\n%bHost: localhost\r\n\r\n",
    "a target with a host": b"GET http://localhost/who HTTP/1.1\r\n%b\r\n",
    "a target without a slash": b"GET who HTTP/1.1\r\n%b\r\n",
    "no version": b"GET /who\r\n%b\r\n",
    "a version of the future": b"GET /who HTTP/3.7\r\n%b\r\n",
    "a method nobody knows": b"STEAL /who HTTP/1.1\r\n%b\r\n",
    "two spaces": b"GET /who extra HTTP/1.1\r\n%b\r\n",
    "a tunnel": b"CONNECT localhost:22 HTTP/1.1\r\n%b\r\n",
    "a chunk of odd size": CHUNKED + b"\r\nxyz\r\nabc\r\n0\r\n\r\n",
    "a chunk of negative size": CHUNKED + b"\r\n-1\r\nabc\r\n0\r\n\r\n",
    "a chunk of endless size": (CHUNKED + b"\r\nfffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
    "a chunk longer than it says": CHUNKED + b"\r\n2\r\nabc\r\n0\r\n\r\n",
    "a chunk that ends in a line feed": CHUNKED + b"\r\n3\nabc\r\n0\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03%b",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n%b",
}


@pytest.mark.parametrize("name", SMUGGLED)
async def test_what_can_be_read_in_two_ways_is_refused_and_the_connection_closed(name: str) -> None:
    smuggled = b"GET /who HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with gateway() as rig:
        client = await rig.connect()
        await client.send(SMUGGLED[name].replace(b"%b", HOST) + smuggled)
        answer = await client.answer()
        assert answer.status == 400
        assert answer.header("connection") == "close"
        assert await client.ended() == b""
        assert rig.probe.bodies == []
        client.abort()
        await rig.idle()


async def test_http_1_1_needs_a_host_and_1_0_does_not() -> None:
    async with gateway() as rig:
        client = await rig.connect()
        await client.send(b"GET /who HTTP/1.1\r\n\r\n")
        assert (await client.answer()).status == 400
        client = await rig.connect()
        await client.send(b"GET /who HTTP/1.0\r\n\r\n")
        assert (await client.answer()).status == 200


async def test_what_is_well_formed_is_read_as_it_is_meant() -> None:
    async with gateway() as rig:
        client = await rig.connect()
        assert (await client.request("POST", "/echo", b"abc")).body == b"abc"
        await client.send(
            b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3;name=value\r\nabc\r\n4\r\ndefg\r\n0\r\nX-Late: 1\r\n\r\n"
        )
        assert (await client.answer()).body == b"abcdefg"
        # Two requests in one packet are answered in turn.
        await client.send(b"GET /who HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]
        assert (await client.request("HEAD", "/who")).body == b""
        assert rig.gateway.connections == 1


async def test_headers_after_the_body_change_nothing() -> None:
    async with gateway() as rig:
        client = await rig.connect()
        await client.send(
            b"POST /who HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\nHost: evil.example\r\nOrigin: http://evil.example\r\n\r\n"
        )
        assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("status", "head"),
    [
        (431, b"X: " + b"y" * 70_000),
        (431, b"\r\n".join(b"X-%d: y" % number for number in range(200))),
        (431, b"\r\n".join(b"X-%d: %b" % (number, b"y" * 1000) for number in range(100))),
    ],
)
async def test_large_headers_are_refused(status: int, head: bytes) -> None:
    async with gateway() as rig:
        client = await rig.connect()
        await client.send(b"GET /who HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
        assert (await client.answer()).status == status
        assert await client.ended() == b""


async def test_headers_without_end_are_refused() -> None:
    async with gateway() as rig:
        client = await rig.connect()
        await client.send(b"GET /who HTTP/1.1\r\nHost: localhost\r\nX: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                await client.send(b"y" * 4096)
                if client.reader.at_eof() or client.reader._buffer:  # type: ignore[attr-defined]
                    break
        assert (await client.answer()).status == 431


async def test_a_long_target_is_refused() -> None:
    async with gateway() as rig:
        answer = await rig.request("GET", "/who?" + "x" * 100_000)
        assert answer.status in (414, 431)


async def test_chunks_that_are_mostly_padding_are_refused() -> None:
    async with gateway() as rig:
        client = await rig.connect()
        await client.send(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                await client.send(b"1;" + b"x" * 4000 + b"\r\na\r\n")
        answer = await client.answer()
        assert answer.status == 400
        await rig.idle()


async def test_a_body_of_single_bytes_is_not_padding() -> None:
    async with gateway() as rig:
        client = await rig.connect()
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await client.send(head + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n")
        assert (await client.answer()).body == b"a" * 50_000


async def test_a_body_over_the_limit_is_refused_and_its_sender_reads_why() -> None:
    async with gateway(max_body_bytes="1MiB") as rig:
        announced = await rig.connect()
        await announced.send(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 209715200\r\n\r\n")
        sending = asyncio.create_task(_send_much(announced, b"x" * 65536, 3200))
        answer = await announced.answer()
        assert (answer.status, answer.header("connection")) == (413, "close")
        await sending
        chunked = await rig.connect()
        await chunked.send(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        sending = asyncio.create_task(_send_much(chunked, b"10000\r\n" + b"x" * 65536 + b"\r\n", 3200))
        assert (await chunked.answer()).status == 413
        await sending
        assert rig.probe.bodies == []
        for client in (announced, chunked):
            client.abort()
        await rig.idle()


async def _send_much(client: Client, piece: bytes, count: int) -> None:
    with contextlib.suppress(ConnectionError):
        for _ in range(count):
            await client.send(piece)


async def test_a_body_that_nobody_reads_does_not_confuse_the_next_request() -> None:
    async with gateway() as rig:
        client = await rig.connect()
        await client.send(b"POST /ignore HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nabc")
        answer = await client.answer()
        assert (answer.body, answer.header("connection")) == (b"ignored", "close")
        await _send_much(client, b"GET /who HTTP/1.1\r\nHost: localhost\r\n\r\n", 3)
        assert await client.ended() == b""
        assert rig.probe.begun == 1
        client.abort()
        await rig.idle()


async def test_a_client_that_waits_for_the_go_ahead_gets_it() -> None:
    async with gateway(max_body_bytes="1KiB") as rig:
        client = await rig.connect()
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        await client.send(head % 3)
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"abc")
        assert (await client.answer()).body == b"abc"
        await client.send(head % 2000)
        assert (await client.answer()).status == 413


# Deadlines


async def test_headers_have_to_come_in_time() -> None:
    async with gateway(header_timeout="1s") as rig:
        slow = await rig.connect()
        await slow.send(b"GET /who HTTP/1.1\r\nHost: loc")
        assert (await slow.answer()).status == 408
        assert await slow.ended() == b""
        blank = await rig.connect()
        await blank.send(b"\r\n\r\n\r\n")
        assert (await blank.answer()).status == 408
        await rig.idle()


async def test_a_body_has_to_go_on_coming() -> None:
    async with gateway(body_timeout="1s") as rig:
        client = await rig.connect()
        await client.send(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc")
        await until(lambda: rig.probe.running == 1)
        assert (await client.answer()).status == 408
        assert await client.ended() == b""
        await rig.idle()


async def test_an_idle_connection_is_closed_and_one_that_waits_for_its_answer_is_not() -> None:
    async with gateway(idle_timeout="1s", header_timeout="1s", body_timeout="1s") as rig:
        waiting = await rig.connect()
        await waiting.send(b"POST /hang HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        fresh, used = await rig.connect(), await rig.connect()
        assert (await used.request("GET", "/who")).status == 200
        assert await fresh.ended() == b""
        assert await used.ended() == b""
        rig.probe.release.set()
        assert (await waiting.answer()).body == b"released"


async def test_a_client_that_does_not_read_is_cut_and_its_stream_ended() -> None:
    async with gateway(slow_reader_timeout="1s") as rig:
        client = await rig.connect()
        await client.send(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: rig.probe.streams == 1)
        await rig.idle()


async def test_an_answer_that_is_written_but_not_read_does_not_keep_the_connection() -> None:
    """A closed transport waits for its buffer; that wait has an end."""
    async with gateway(slow_reader_timeout="1s", idle_timeout="1s") as rig:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", rig.port))
        body = b"x" * 4_000_000
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        with sock:
            await loop.sock_sendall(sock, head + body)
            await until(lambda: rig.probe.bodies != [])
            await until(lambda: rig.gateway.connections == 0)


# Clients that leave


async def _leave(client: Client, how: str) -> None:
    if how == "reset":
        client.abort()
    elif how == "close":
        await client.close()
    else:
        client.writer.write_eof()


LEAVING = {
    "before a byte": (b"", None),
    "in the request line": (b"GET /wh", None),
    "in the headers": (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nX: y", None),
    "before the body": (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n", "running"),
    "in the body": (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc", "running"),
    "in a chunk": (
        b"POST /json HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc",
        "running",
    ),
    "while its answer is made": (b"POST /hang HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", "running"),
    "before the first chunk": (b"POST /late HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", "streams"),
    "in the stream": (b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", "streams"),
    "with more requests behind": (b"GET /hang HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5, "running"),
}


@pytest.mark.parametrize("how", ["reset", "close", "half close"])
@pytest.mark.parametrize("when", LEAVING)
async def test_a_client_that_leaves_takes_everything_with_it(when: str, how: str) -> None:
    sent, counter = LEAVING[when]
    async with gateway() as rig:
        await rig.request("GET", "/who")
        rig.clients.pop().abort()
        await rig.idle()
        descriptors, tasks = psutil.Process().num_fds(), len(asyncio.all_tasks())
        for _ in range(5):
            client = await rig.connect()
            await client.send(sent)
            if counter is not None:
                await until(lambda: getattr(rig.probe, counter) == 1)
            else:
                await until(lambda: rig.gateway.connections == 1)
            await _leave(client, how)
            await rig.idle()
            client.abort()
        rig.clients.clear()
        await until(lambda: psutil.Process().num_fds() <= descriptors)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        if when == "with more requests behind":
            assert rig.probe.begun == 5 + 1


# Many


async def test_five_hundred_idle_connections_are_no_trouble() -> None:
    async with gateway() as rig:
        idle = [await rig.connect() for _ in range(500)]
        for client in idle:
            assert (await client.request("GET", "/who")).status == 200
        assert rig.gateway.connections == 500
        assert rig.gateway.requests == 0
        assert (await rig.request("GET", "/who")).status == 200
        for client in idle:
            assert (await client.request("GET", "/who")).status == 200


async def test_one_user_cannot_take_all_connections() -> None:
    async with gateway(max_connections_per_user=3) as rig:
        kept = [await rig.connect() for _ in range(3)]
        assert [(await client.request("GET", "/who")).status for client in kept] == [200] * 3
        refused = await rig.connect()
        assert (await refused.answer()).status == 503
        assert await refused.ended() == b""
        kept.pop().abort()
        await until(lambda: rig.gateway.connections == 2)
        assert (await rig.request("GET", "/who")).status == 200


async def test_there_is_an_end_to_all_connections() -> None:
    async with gateway(max_connections=100, max_connections_per_user=100) as rig:
        for _ in range(100):
            assert (await (await rig.connect()).request("GET", "/who")).status == 200
        assert (await (await rig.connect()).answer()).status == 503


async def test_a_handler_that_fails_is_answered_in_its_own_shape() -> None:
    async with gateway() as rig:
        client = await rig.connect()
        answer = await client.request("GET", "/defect")
        assert answer.status == 500
        assert b'{"error":"internal error in the daemon; its log has more under error_id ' in answer.body
        assert b"ZeroDivisionError" not in answer.body
        assert (await client.request("GET", "/who")).status == 200


async def test_stopping_closes_idle_connections_and_ends_requests() -> None:
    async with gateway() as rig:
        idle, busy = await rig.connect(), await rig.connect()
        assert (await idle.request("GET", "/who")).status == 200
        await busy.send(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await until(lambda: rig.probe.streams == 1)
        stopping = asyncio.create_task(rig.gateway.stop())
        assert await idle.ended() == b""
        with pytest.raises(ConnectionRefusedError):
            await rig.connect()
        rig.probe.release.set()
        answer = await busy.answer()
        assert (answer.body, answer.whole) == (b"first\nlast\n", True)
        assert await busy.ended() == b""
        await stopping
        await rig.idle()
